// The page: microphone -> WebSocket -> speaker, and what it shows. One conversation, one module, no library.

const RATE = 24000;
const RETRIES = 5;
const el = (id) => document.getElementById(id);
const items = new Map(); // item id -> its entry in the transcript
const responses = new Map(); // response id -> {item, text}
let call = null; // the running conversation
const times = { answer: [], stop: [] };

el("talk").addEventListener("click", () => (call ? hangUp() : start()));
el("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", (event) => event.key === "Escape" && cancel());
el("eagerness").addEventListener("change", () => call && send(detection()));

async function start() {
  problem("");
  el("talk").disabled = true;
  try {
    if (!navigator.mediaDevices) throw new Error("This page may not use the microphone: open it from localhost or by https.");
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 },
    });
    const context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    call = { stream, context, token: null, socket: null, tries: 0, lastLoud: 0, loudSince: 0, floor: 0.01, speaking: null };
    await context.audioWorklet.addModule("/audio.js");
    call.microphone = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
    call.speaker = new AudioWorkletNode(context, "speaker", { numberOfInputs: 0, outputChannelCount: [1] });
    call.microphone.port.onmessage = ({ data }) => heard(data);
    call.speaker.port.onmessage = ({ data }) => played(data);
    context.createMediaStreamSource(stream).connect(call.microphone);
    call.speaker.connect(context.destination);
    await context.resume();
    connect();
    el("talk").textContent = "Stop";
    el("talk").setAttribute("aria-pressed", "true");
  } catch (error) {
    hangUp();
    problem(error.name === "NotAllowedError" ? "The microphone was not allowed. Allow it for this page and press Talk again." : error.message);
  }
  el("talk").disabled = false;
}

function hangUp() {
  const ended = call;
  call = null;
  ended?.socket?.close(1000);
  ended?.stream.getTracks().forEach((track) => track.stop());
  ended?.context.close();
  el("talk").textContent = "Talk";
  el("talk").setAttribute("aria-pressed", "false");
  el("cancel").disabled = true;
  level("you", 0);
  level("minmo", 0);
  state("off", "Not connected");
}

function connect() {
  const mine = call;
  const url = new URL("/v1/realtime", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.searchParams.set("duplex", "1");
  if (mine.token) url.searchParams.set("resume", mine.token);
  const key = el("key").value.trim();
  const socket = new WebSocket(url, key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]);
  mine.socket = socket;
  state("connecting", mine.token ? "Connecting again" : "Connecting");
  let greeted = false;
  socket.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    greeted ||= event.type === "session.created" || event.type === "session.resumed";
    on[event.type]?.(event);
  };
  socket.onclose = ({ code, reason }) => {
    if (call !== mine) return;
    mine.speaker.port.postMessage({ flush: true });
    const comesBack = mine.token && ![1008, 1013, 4000].includes(code) && mine.tries < RETRIES;
    if (comesBack) {
      setTimeout(() => call === mine && connect(), 250 * 2 ** mine.tries++);
      state("connecting", "Connecting again");
      return;
    }
    hangUp();
    if (el("problem").hidden) {
      problem(greeted ? `The connection ended${reason ? `: ${reason}` : ""}. Press Talk to begin another.`
        : "The server did not accept the connection. Does it ask for an API key (below, on the right)?");
    }
  };
}

function send(event) {
  if (call?.socket?.readyState === WebSocket.OPEN) call.socket.send(JSON.stringify(event));
}

function detection() {
  const eagerness = document.querySelector("[name=eagerness]:checked").value;
  const input = { turn_detection: { type: "semantic_vad", eagerness }, transcription: { model: call.model } };
  return { type: "session.update", session: { type: "realtime", audio: { input } } };
}

function cancel() {
  if (call?.response) send({ type: "response.cancel", response_id: call.response });
}

// The microphone's pieces: sent, shown, and watched for where the voice begins and ends by this page's own ear.
function heard({ pcm, level: loudness }) {
  if (!call) return;
  const now = performance.now();
  call.floor = Math.min(loudness, call.floor * 1.01 + 1e-5);
  if (loudness > Math.max(0.01, 4 * call.floor)) {
    if (now - call.lastLoud > 300) call.loudSince = now;
    call.lastLoud = now;
  }
  level("you", loudness);
  send({ type: "input_audio_buffer.append", audio: base64(pcm) });
}

function played({ why, id, played: all, level: loudness, waiting }) {
  if (!call) return;
  if (why === "began") {
    if (call.lastLoud) note("answer", performance.now() - call.lastLoud);
    return;
  }
  level("minmo", loudness);
  for (const [response, samples] of all) {
    if (samples !== responses.get(response)?.acknowledged && responses.has(response)) {
      responses.get(response).acknowledged = samples;
      send({ type: "playback.ack", response_id: response, played_ms: Math.floor((1e3 * samples) / RATE) });
    }
  }
  call.sounding = waiting > 0;
}

const on = {
  "session.created": ({ session, resume_token: token }) => begun(session, token),
  "session.resumed": ({ session, resume_token: token }) => begun(session, token),
  "session.replaced": () => problem("The conversation goes on in another window."),
  "input_audio_buffer.committed": ({ item_id: id }) => entry(id, "user", "…"),
  "conversation.item.input_audio_transcription.completed": ({ item_id: id, transcript }) => entry(id, "user", transcript || "(nothing)"),
  "conversation.item.input_audio_transcription.failed": ({ item_id: id }) => entry(id, "user", "(not understood)"),
  "response.created": ({ response }) => {
    call.response = response.id;
    el("cancel").disabled = false;
  },
  "response.output_item.added": ({ response_id: response, item }) => responses.set(response, { item: item.id, text: "", acknowledged: 0 }),
  "response.output_audio_transcript.delta": ({ response_id: response, delta }) => {
    const found = responses.get(response);
    found.text += delta;
    entry(found.item, "assistant", found.text);
  },
  "response.output_audio.delta": ({ response_id: id, delta }) => {
    const samples = floats(delta);
    call.speaker.port.postMessage({ id, samples }, [samples.buffer]);
  },
  "response.interrupted": ({ response_id: response, heard_text: heardText }) => {
    call.speaker.port.postMessage({ flush: true });
    if (call.loudSince) note("stop", performance.now() - call.loudSince);
    const found = responses.get(response);
    if (found) entry(found.item, "assistant", found.text, heardText);
  },
  "response.done": ({ response }) => {
    if (call.response === response.id) call.response = null;
    el("cancel").disabled = true;
  },
  "response.listen": (event) => decided(event),
  "response.speak": (event) => decided(event),
  error: ({ error }) => error.code !== "response_cancel_not_active" && problem(error.message),
};

function begun(session, token) {
  call.token = token;
  call.model = session.model;
  call.tries = 0;
  call.response = null;
  send(detection());
  state("listening", "Listening");
}

function decided({ phase, answer, stop }) {
  el("p-answer").textContent = `${Math.round(100 * answer)} %`;
  el("p-stop").textContent = `${Math.round(100 * stop)} %`;
  if (phase === "speaking") state("speaking", "Speaking");
  else if (phase === "taking") state("thinking", "About to answer");
  else state("listening", "Listening");
}

// What is shown.

function entry(id, role, text, heardText = null) {
  el("empty").hidden = true;
  let shown = items.get(id);
  if (!shown) {
    shown = document.createElement("li");
    shown.className = role;
    items.set(id, shown);
    el("transcript").append(shown);
  }
  const who = document.createElement("b");
  who.textContent = role === "user" ? "You" : "MinMo";
  shown.replaceChildren(who);
  if (heardText === null) {
    shown.append(text);
  } else {
    const rest = document.createElement("del");
    rest.textContent = text.startsWith(heardText) ? text.slice(heardText.length) : text;
    const why = document.createElement("small");
    why.textContent = "interrupted";
    shown.append(text.startsWith(heardText) ? heardText : "", rest, why);
  }
  el("transcript").scrollTop = el("transcript").scrollHeight;
}

function state(name, words) {
  if (el("state").dataset.state === name && el("state").textContent === words) return;
  el("state").dataset.state = name;
  el("state").textContent = words;
}

function problem(words) {
  el("problem").textContent = words;
  el("problem").hidden = !words;
}

function level(id, rms) {
  const share = rms > 0 ? Math.max(0, Math.min(1, 1 + Math.log10(rms * 2) / 2.5)) : 0;
  el(id).firstElementChild.style.transform = `scaleX(${share.toFixed(3)})`;
  el(id).setAttribute("aria-valuenow", Math.round(100 * share));
}

function note(what, ms) {
  times[what].push(ms);
  const sorted = [...times[what]].sort((a, b) => a - b);
  const median = sorted[sorted.length >> 1];
  el(what).textContent = `${Math.round(ms)} ms` + (sorted.length > 1 ? ` (median ${Math.round(median)})` : "");
}

function base64(buffer) {
  let text = "";
  for (const byte of new Uint8Array(buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const whole = new Int16Array(bytes.buffer, 0, bytes.length >> 1);
  return Float32Array.from(whole, (value) => value / 32768);
}
