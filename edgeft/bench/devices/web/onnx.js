// An ONNX package in onnxruntime-web, its WebAssembly provider: a graph with past and present keys and values.

import * as ort from '/npm/onnxruntime-web/dist/ort.wasm.min.mjs';

const PAST = 'past_key_values.', PRESENT = 'present.';

export async function open({ files, threads }) {
  ort.env.wasm.wasmPaths = '/npm/onnxruntime-web/dist/';
  ort.env.wasm.numThreads = threads;
  const fetched = {};
  for (const name of files.filter((name) => name.startsWith('model.onnx'))) {
    const answer = await fetch(`/package/${name}`);
    if (!answer.ok) throw new Error(`cannot fetch ${name}: ${answer.status}`);
    fetched[name] = new Uint8Array(await answer.arrayBuffer());
  }
  const { 'model.onnx': graph, ...data } = fetched;
  const session = await ort.InferenceSession.create(graph, {
    executionProviders: ['wasm'],
    externalData: Object.entries(data).map(([path, bytes]) => ({ path, data: bytes })),
  });
  const facts = { runtime: 'onnxruntime-web', version: ort.env.versions.web, threads: ort.env.wasm.numThreads };
  return { engine: new Engine(session), facts };
}

class Engine {
  constructor(session) {
    this.session = session;
    this.empty = {};
    for (const about of session.inputMetadata.filter(({ name }) => name.startsWith(PAST))) {
      if (about.type !== 'float32') throw new Error(`${about.name} is of type ${about.type}; this page knows float32`);
      const [, heads, , size] = about.shape;
      this.empty[about.name] = new ort.Tensor('float32', new Float32Array(0), [1, heads, 0, size]);
    }
  }

  // Feed tokens after `past` ({length, tensors}): their logits, and the past with them.
  async feed(ids, past) {
    const length = (past?.length ?? 0) + ids.length;
    const numbers = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
    const given = { ...(past?.tensors ?? this.empty), input_ids: numbers(ids) };
    if (this.session.inputNames.includes('attention_mask')) given.attention_mask = numbers(Array(length).fill(1));
    if (this.session.inputNames.includes('position_ids')) {
      given.position_ids = numbers(ids.map((_, i) => length - ids.length + i));
    }
    const found = await this.session.run(given);
    const tensors = {};
    for (const name in this.empty) tensors[name] = found[name.replace(PAST, PRESENT)];
    const [, rows, size] = found.logits.dims;
    if (rows !== ids.length) throw new Error(`the graph gives logits of ${rows} positions for ${ids.length} tokens`);
    return { logits: found.logits.data, size, past: { length, tensors } };
  }

  async timed({ ids: prompt }, steps) {
    const start = performance.now();
    let found = await this.feed(prompt, null);
    const fed = performance.now();
    let token = likeliest(found, prompt.length - 1);
    let mark = performance.now();
    const sample = { prompt_tokens: prompt.length, prefill_s: (fed - start) / 1000, choose_s: (mark - fed) / 1000 };
    sample.decode_s = [];
    for (let i = 0; i < steps; i++) {
      found = await this.feed([token], found.past);
      token = likeliest(found, 0);
      const now = performance.now();
      sample.decode_s.push((now - mark) / 1000);
      mark = now;
    }
    return sample;
  }

  async row({ ids: prompt }, { ids: reference }, stop, most) {
    const begun = await this.feed(prompt, null);
    const first = last(begun, prompt.length - 1);
    const fed = reference.slice(0, -1);
    const after = fed.length ? await this.feed(fed, begun.past) : null;
    const at = (i) => (i === 0 ? first : last(after, i - 1));
    const scores = scored(reference.map((token, i) => ({ values: at(i), next: token })));
    const answer = [];
    let token = argmax(first), past = begun.past;
    while (answer.length < most && !stop.includes(token)) {
      answer.push(token);
      const found = await this.feed([token], past);
      past = found.past;
      token = likeliest(found, 0);
    }
    return { answer, reference: scores };
  }

  async score({ ids }, positions, whole) {
    const found = await this.feed(ids.slice(0, positions.at(-1) + 1), null);
    const values = positions.map((at) => last(found, at));
    const scores = scored(values.map((row, i) => ({ values: row, next: ids[positions[i] + 1] ?? null })));
    if (!whole) return scores;
    const logits = new Float32Array(values.length * found.size);
    values.forEach((row, i) => logits.set(row, i * found.size));
    return { ...scores, logits };
  }
}

const last = ({ logits, size }, row) => logits.subarray(row * size, (row + 1) * size);
const likeliest = (found, row) => argmax(last(found, row));

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// Log-probabilities of the next and of the likeliest token, summed in double precision.
function scored(rows) {
  const found = { next_logprob: [], argmax: [], top_logprob: [] };
  for (const { values, next } of rows) {
    const best = argmax(values), top = values[best];
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += Math.exp(values[i] - top);
    found.argmax.push(best);
    found.top_logprob.push(-Math.log(sum));
    found.next_logprob.push(next === null ? null : values[next] - top - Math.log(sum));
  }
  return found;
}
