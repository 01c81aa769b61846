// What edgeft calls in this page: an engine for the package's format. Tokens go in as {ids, pieces} (`pieces`: the bytes
// of each as characters; an engine that takes ids does without) and come out as ids.
//
// An engine has load(options), timed(prompt, steps), row(prompt, reference, stop, most), score(ids, positions, whole).
// The host calls them one after the other; nothing goes to it inside a timed loop.

const ENGINES = { gguf: '/page/gguf.js', onnx: '/page/onnx.js' };
let engine = null;

async function load(format, options) {
  const { open } = await import(ENGINES[format]);
  const start = performance.now();
  const found = await open(options);
  engine = found.engine;
  return { ...found.facts, load_s: (performance.now() - start) / 1000 };
}

// Bytes of this page with its workers and their WebAssembly, by kind; null where the browser does not tell.
async function memory(seconds) {
  if (!performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((done) => setTimeout(() => done(null), 1000 * seconds));
  const found = await Promise.race([performance.measureUserAgentSpecificMemory(), late]);
  if (!found) return null;
  const kinds = {};
  for (const part of found.breakdown) {
    const kind = part.types.join('+') || 'other';
    if (part.bytes) kinds[kind] = (kinds[kind] ?? 0) + part.bytes;
  }
  return { bytes: found.bytes, kinds };
}

// Raw little-endian float32 values as base64: the host writes them to a file.
async function packed(values) {
  const reader = new FileReader();
  const done = new Promise((resolve, reject) => {
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(',') + 1));
    reader.onerror = () => reject(reader.error);
  });
  reader.readAsDataURL(new Blob([values]));
  return done;
}

window.edgeft = {
  load,
  memory,
  timed: (prompt, steps) => engine.timed(prompt, steps),
  row: (prompt, reference, stop, most) => engine.row(prompt, reference, stop, most),
  async score(row, positions, whole) {
    const { logits, ...scores } = await engine.score(row, positions, whole);
    return whole ? { ...scores, logits: await packed(logits) } : scores;
  },
  about: () => ({
    isolated: self.crossOriginIsolated,
    agent: navigator.userAgent,
    cores: navigator.hardwareConcurrency,
    memory_gb: navigator.deviceMemory ?? null,
  }),
};
