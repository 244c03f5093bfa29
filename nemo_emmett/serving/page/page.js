"use strict";

const $ = (id) => document.getElementById(id);
const READ_BY_SERVER = /\.(wav|flac|ogg|oga|opus|mp3|aiff?|au|caf|w64)$/i;

let model = null; // the entry of /v1/models
let key = ""; // of the server, kept in this page alone
let recording = null; // {blob, name} to translate
let microphone = null; // while it records
let request = null; // AbortController of the request under way

// The server.

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it running?");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  if (response.status === 401) $("key-form").hidden = false;
  throw new Error(body.error?.message ?? `The server answered with status ${response.status}.`);
}

async function connect() {
  try {
    model = (await call("v1/models")).data[0];
  } catch (error) {
    $("model").textContent = "";
    showError(error);
    return;
  }
  $("key-form").hidden = true;
  $("model").textContent = `Model: ${model.id}`;
  $("speech").hidden = !model.reads_speech;
  $("text").maxLength = model.limits.text_characters;
  showTargets();
  clearMessages();
}

async function translate(path, options, shown) {
  if (request) request.abort();
  request = new AbortController();
  const own = request;
  clearMessages();
  $("result").hidden = true;
  $("status").textContent = "Translating …";
  try {
    const body = await call(path, { method: "POST", signal: own.signal, ...options });
    $("status").textContent = "";
    shown(body);
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  } finally {
    if (request === own) request = null;
  }
}

function translateText() {
  const text = $("text").value.trim();
  if (!text) {
    showError(new Error("Type a text first."));
    $("text").focus();
    return;
  }
  const body = { text, target: $("target").value, ...($("source").value && { source: $("source").value }) };
  const options = { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  translate("v1/translate", options, ({ translations }) => showResult(translations[0]));
}

function translateSpeech() {
  const form = new FormData();
  form.append("file", recording.blob, "recording");
  form.append("response_format", "verbose_json");
  const [source, target] = [$("source").value, $("target").value];
  if (source) form.append("language", source);
  const transcribes = source && source === target;
  if (!transcribes) form.append("to_language", target);
  const path = transcribes ? "v1/audio/transcriptions" : "v1/audio/translations";
  translate(path, { body: form }, (body) => showResult(body.text, body.transcript));
}

// What is shown.

function showResult(translation, transcript = null) {
  $("translation").textContent = translation || "(nothing)";
  $("transcript").textContent = transcript ?? "";
  $("transcript-part").hidden = !transcript;
  $("result").hidden = false;
  $("result").scrollIntoView({ block: "nearest" }); // on a phone it is below the forms
}

function showError(error) {
  $("status").textContent = "";
  $("error").textContent = error.message;
  $("error").hidden = false;
}

function clearMessages() {
  $("error").hidden = true;
  $("status").textContent = "";
}

function fill(select, codes, name) {
  const before = select.value;
  select.replaceChildren(...codes.map((code) => new Option(name(code), code)));
  if (codes.includes(before)) select.value = before;
}

function named(code) {
  return model.languages[code] ?? code;
}

function sorted(codes) {
  return [...new Set(codes)].sort((one, other) => named(one).localeCompare(named(other)));
}

function showTargets() {
  const targets = sorted(model.directions.map(({ target }) => target));
  // A model that does not say what it was trained on: the languages of the browser, and English.
  fill($("target"), targets.length ? targets : sorted(["en", ...navigator.languages.map((tag) => tag.split("-")[0])]), named);
  if (!$("target").dataset.chosen && targets.includes("en")) $("target").value = "en";
  showSources();
}

function showSources() {
  const fits = model.directions.filter(({ target }) => target === $("target").value);
  const sources = sorted(fits.map(({ source }) => source ?? ""));
  const choices = sources.length === 1 ? sources : ["", ...sources.filter(Boolean)];
  fill($("source"), choices, (code) => (code ? named(code) : "Not named"));
}

// A recording, from a file or the microphone.

async function useFile(file) {
  clearMessages();
  if (file.size === 0) return showError(new Error(`${file.name} is empty.`));
  let blob = file;
  if (!READ_BY_SERVER.test(file.name)) { // such as a phone's .m4a: the browser may know it
    try {
      blob = await converted(file);
    } catch {
      return showError(new Error(`${file.name} is no recording that can be read.`));
    }
  }
  useRecording(blob, file.name);
}

function useRecording(blob, name) {
  if (blob.size > model.limits.upload_bytes) {
    const limit = (model.limits.upload_bytes / 2 ** 20).toFixed(0);
    return showError(new Error(`${name} is larger than the ${limit} MiB that the server takes.`));
  }
  if (recording) URL.revokeObjectURL($("player").src);
  recording = { blob, name };
  $("player").src = URL.createObjectURL(blob);
  $("recording-name").textContent = name;
  $("recording").hidden = false;
  $("result").hidden = true;
}

async function converted(file) {
  const context = new AudioContext();
  try {
    const audio = await context.decodeAudioData(await file.arrayBuffer());
    const mono = new Float32Array(audio.length);
    for (let channel = 0; channel < audio.numberOfChannels; channel++) {
      audio.getChannelData(channel).forEach((sample, i) => (mono[i] += sample / audio.numberOfChannels));
    }
    return wav([mono], audio.sampleRate);
  } finally {
    context.close();
  }
}

async function startRecording() {
  clearMessages();
  if (!navigator.mediaDevices?.getUserMedia) {
    return showError(new Error("The browser allows the microphone on https:// and localhost only; choose a file."));
  }
  let stream;
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    stream = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    const sentences = {
      NotAllowedError: "The microphone is not allowed; allow it in the browser's settings for this page.",
      NotFoundError: "There is no microphone.",
    };
    return showError(new Error(sentences[error.name] ?? `The microphone cannot be used (${error.message}).`));
  }
  const context = new AudioContext();
  await context.audioWorklet.addModule("recorder.js");
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  microphone = { stream, context, pieces: [], samples: 0 };
  node.port.onmessage = ({ data }) => {
    if (!microphone) return;
    microphone.pieces.push(data);
    microphone.samples += data.length;
    const seconds = microphone.samples / context.sampleRate;
    $("level").value = Math.max(...data.map(Math.abs));
    const limit = model.limits.audio_seconds;
    const limitOfSize = (model.limits.upload_bytes - 2 ** 16) / 2 / context.sampleRate;
    $("record").textContent = `Stop (${Math.floor(seconds)} s)`;
    if (seconds >= Math.min(limit, limitOfSize) - 1) stopRecording();
  };
  context.createMediaStreamSource(stream).connect(node);
  $("record").setAttribute("aria-pressed", "true");
  $("record").textContent = "Stop (0 s)";
  $("level").hidden = false;
  $("recording").hidden = $("result").hidden = true;
  $("status").textContent = "Recording.";
}

function stopRecording() {
  const { stream, context, pieces, samples } = microphone;
  microphone = null;
  stream.getTracks().forEach((track) => track.stop());
  const rate = context.sampleRate;
  context.close();
  $("record").setAttribute("aria-pressed", "false");
  $("record").textContent = "Record";
  $("level").hidden = true;
  clearMessages();
  if (samples === 0) return showError(new Error("Nothing was recorded."));
  useRecording(wav(pieces, rate), `Recording of ${(samples / rate).toFixed(1)} s`);
  translateSpeech();
}

// A WAV file of 16 bits and one channel.
function wav(pieces, rate) {
  const samples = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (offset, letters) => [...letters].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples, true);
  let offset = 44;
  for (const piece of pieces) {
    for (const sample of piece) {
      view.setInt16(offset, Math.max(-1, Math.min(1, sample)) * 0x7fff, true);
      offset += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

// What the reader does.

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  connect();
});
$("target").addEventListener("change", () => {
  $("target").dataset.chosen = "yes";
  showSources();
});
$("record").addEventListener("click", () => (microphone ? stopRecording() : startRecording()));
$("file").addEventListener("change", () => {
  if ($("file").files.length) useFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("translate-speech").addEventListener("click", translateSpeech);
$("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  translateText();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    translateText();
  }
});
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("translation").textContent);
  $("status").textContent = "Copied.";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a file that is dropped elsewhere would replace the page
    $("speech").classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && model?.reads_speech && event.dataTransfer.files.length) useFile(event.dataTransfer.files[0]);
  });
}
$("player").addEventListener("error", () => {
  if (recording) $("recording-name").textContent = `${recording.name} (this browser cannot play it)`;
});

connect();
