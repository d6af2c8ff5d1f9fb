// Two AudioWorklet processors, in the audio thread: the microphone in pieces of 40 ms, and the speaker, a queue that can
// be emptied at once and tells how much of each response has been played.

const PIECE = 960; // samples of 24 kHz

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(PIECE);
    this.at = 0;
    this.square = 0;
  }

  process([input]) {
    const samples = input[0];
    if (!samples) return true; // nothing is connected yet
    for (const sample of samples) {
      const value = Math.max(-1, Math.min(1, sample));
      this.piece[this.at++] = Math.round(value * (value < 0 ? 32768 : 32767));
      this.square += value * value;
      if (this.at === PIECE) {
        const level = Math.sqrt(this.square / PIECE);
        this.port.postMessage({ pcm: this.piece.buffer, level }, [this.piece.buffer]);
        this.piece = new Int16Array(PIECE);
        this.at = this.square = 0;
      }
    }
    return true;
  }
}

class Speaker extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = []; // {id, samples, at}
    this.played = new Map(); // response -> samples
    this.told = 0;
    this.square = this.count = 0;
    this.port.onmessage = ({ data }) => {
      if (data.flush) {
        this.queue = [];
        this.tell("flushed");
      } else {
        this.queue.push({ id: data.id, samples: data.samples, at: 0 });
      }
    };
  }

  tell(why) {
    const level = this.count ? Math.sqrt(this.square / this.count) : 0;
    this.port.postMessage({ why, played: [...this.played], level, waiting: this.queue.length });
    this.square = this.count = this.told = 0;
    // The newest goes on being counted, also where nothing of it waits: its next sound may be late.
    const newest = [...this.played.keys()].pop();
    for (const id of this.played.keys()) if (id !== newest) this.played.delete(id);
  }

  process(_, [[output]]) {
    let at = 0;
    while (at < output.length && this.queue.length) {
      const head = this.queue[0];
      if (!this.played.has(head.id)) {
        this.played.set(head.id, 0);
        this.port.postMessage({ why: "began", id: head.id });
      }
      const n = Math.min(output.length - at, head.samples.length - head.at);
      output.set(head.samples.subarray(head.at, head.at + n), at);
      head.at += n;
      at += n;
      this.played.set(head.id, this.played.get(head.id) + n);
      if (head.at === head.samples.length) this.queue.shift();
    }
    for (let i = 0; i < at; i++) this.square += output[i] * output[i];
    this.count += output.length;
    this.told += output.length;
    if (this.told >= 1920) this.tell("playing"); // every 80 ms
    return true;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("speaker", Speaker);
