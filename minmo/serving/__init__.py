"""The server: OpenAI's Realtime protocol over a WebSocket, and a page that talks with it. `minmo serve` runs it."""
