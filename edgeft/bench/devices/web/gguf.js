// A GGUF package in wllama (llama.cpp as WebAssembly, in a worker).
//
// wllama takes prompts as text and says for each token that it generates the likeliest tokens before sampling. So
// - prompts come as the texts of their tokens, and it is checked that wllama finds as many tokens in them;
// - a given text is scored by holding the answer to a grammar that knows this text alone: what is read are the
//   probabilities before the grammar. Where the grammar lets another way of cutting the text win, that token is banned;
//   where that does not help either, each position is asked for by itself, and a token that is not among the likeliest
//   counts as the least likely of them.
// wllama 3.8 ends when one of the tokens that it names is not the beginning of a character. It is then started anew and
// asked for fewer tokens, and at last for the text alone.

import { Wllama } from '/npm/wllama/esm/index.js';

const TOPS = [32, 4, 1]; // likeliest tokens that are asked for beside the given one
const ROOM = 16; // tokens of context that it keeps for itself
const BAN = -100; // nats: less likely than what the grammar wants; with -inf wllama ended, why is not known
const MOST_BANS = 24; // tokens that are banned at most until a text is cut as it should be

export async function open({ threads, context }) {
  const answer = await fetch('/package/model.gguf');
  if (!answer.ok) throw new Error(`cannot fetch model.gguf: ${answer.status}`);
  const blob = await answer.blob();
  const engine = new Engine(blob, { n_ctx: context + ROOM, n_threads: threads, n_gpu_layers: 0, warmup: false, n_parallel: 1 });
  await engine.start();
  const wllama = engine.wllama;
  const version = Wllama.getLibllamaVersion?.() ?? null;
  const facts = { runtime: 'wllama', version, threads: wllama.isMultithread() ? wllama.getNumThreads() : 1 };
  return { engine, facts };
}

class Engine {
  constructor(blob, options) {
    Object.assign(this, { blob, options });
  }

  async start() {
    await this.wllama?.exit().catch(() => {}); // one that has crashed does not answer
    const said = (this.said = []); // what wllama warned of
    const note = (...parts) => said.push(parts.map(String).join(' '));
    const logger = { debug: () => {}, log: () => {}, warn: note, error: note };
    this.wllama = new Wllama({ default: '/npm/wllama/esm/wasm/wllama.wasm' }, { logger });
    try {
      await this.wllama.loadModel([this.blob], this.options);
    } catch (error) {
      throw new Error([error?.message ?? String(error), ...said.slice(-4)].join('\n'));
    }
    this.size = this.wllama.getLoadedContextInfo().n_vocab;
  }

  // The first of some ways of asking that does not crash wllama; null if all do.
  async first(ways) {
    for (const way of ways) {
      try {
        return await way();
      } catch (error) {
        if (!/RuntimeError$/.test(error?.name ?? '')) throw error;
        this.crash = [error.message, ...this.said.slice(-2)].join('; ');
        await this.start();
      }
    }
    return null;
  }

  async *chunks(prompt, most, options, exact = true) {
    const greedy = { temperature: 0, top_k: 1, seed: 0, stream: true, timings_per_token: true };
    const asked = { prompt: textOf(prompt, exact), max_tokens: most, ...greedy, ...options };
    for await (const chunk of await this.wllama.createCompletion(asked)) yield chunk;
  }

  // Generated tokens with the likeliest ones before sampling: {id, logprob, top_logprobs: [{id, logprob}]}
  async *tokens(prompt, most, options) {
    let checked = false;
    for await (const chunk of this.chunks(prompt, most, { cache_prompt: true, ...options })) {
      if (chunk.timings && !checked) {
        const found = chunk.timings.prompt_n + chunk.timings.cache_n;
        if (found !== prompt.ids.length) {
          throw new Error(`wllama cuts a prompt of ${prompt.ids.length} tokens into ${found}`);
        }
        checked = true;
      }
      yield* chunk.choices?.[0]?.logprobs?.content ?? [];
    }
  }

  // The times at which tokens arrive here, behind worker and text: what an app on this page would see. Of a prompt that
  // wllama cuts into another number of tokens, that number is told.
  async timed(prompt, steps) {
    const start = performance.now();
    const times = [];
    let found = prompt.ids.length;
    for await (const chunk of this.chunks(prompt, steps + 1, { ignore_eos: true, cache_prompt: false }, false)) {
      const now = performance.now();
      const from = times.at(-1) ?? now;
      const missing = Math.min(steps + 1, chunk.timings?.predicted_n ?? 0) - times.length;
      for (let i = 1; i <= missing; i++) times.push(from + ((now - from) * i) / missing); // a character of several tokens
      found = chunk.timings?.prompt_n ?? found;
    }
    if (times.length !== steps + 1) throw new Error(`${times.length} tokens came where ${steps + 1} were asked for`);
    const decode_s = times.slice(1).map((time, i) => (time - times[i]) / 1000);
    return { prompt_tokens: found, prefill_s: (times[0] - start) / 1000, choose_s: 0, decode_s };
  }

  async row(prompt, reference, stop, most) {
    const said = most ? await this.first([() => this.answer(prompt, stop, most), () => this.told(prompt, most)]) : [];
    if (said === null) throw new Error(`wllama ended while it answered a row: ${this.crash}`);
    const whole = { ids: [...prompt.ids, ...reference.ids], pieces: [...prompt.pieces, ...reference.pieces] };
    const positions = reference.ids.map((_, i) => prompt.ids.length - 1 + i);
    const { logits, ...scores } = await this.score(whole, positions, false);
    return { ...(typeof said === 'string' ? { text: said } : { answer: said }), reference: scores };
  }

  async answer(prompt, stop, most) {
    const ids = [];
    for await (const { id } of this.tokens(prompt, most, { n_probs: 1 })) ids.push(id);
    const end = ids.findIndex((id) => stop.includes(id));
    return end < 0 ? ids : ids.slice(0, end);
  }

  async told(prompt, most) {
    let text = '';
    for await (const chunk of this.chunks(prompt, most, { cache_prompt: true })) text += chunk.choices?.[0]?.text ?? '';
    return text;
  }

  // With `whole` also log-probabilities of the likeliest tokens at each position, NaN for those that were not told.
  async score(row, positions, whole) {
    const scores = await this.first((whole ? TOPS : TOPS.slice(-1)).map((top) => () => this.scores(row, positions, top)));
    if (!scores) throw new Error(`wllama ended while it scored a row: ${this.crash}`);
    const { tops, ...told } = scores;
    if (!whole) return told;
    const logits = new Float32Array(positions.length * this.size).fill(NaN);
    tops.forEach((top, number) => top.forEach(({ id, logprob }) => { logits[number * this.size + id] = logprob; }));
    return { ...told, logits };
  }

  async scores(row, positions, top) {
    if (!positions.length) return nothing();
    const first = positions[0];
    const count = positions.at(-1) - first + 1;
    const forced = (await this.force(row, first, count, top)) ?? (await this.each(row, first, count));
    const found = { ...nothing(), tops: [] };
    for (const at of positions) {
      const { id, logprob, top_logprobs: tops } = forced[at - first];
      found.argmax.push(tops[0].id);
      found.top_logprob.push(tops[0].logprob);
      found.next_logprob.push(at + 1 < row.ids.length ? logprob : null);
      found.tops.push([{ id, logprob }, ...tops]);
    }
    return found;
  }

  // The same position by position, each as a prompt of its own.
  async each(row, first, count) {
    const found = [];
    for (let at = first; at < first + count; at++) found.push(await this.chosen(part(row, 0, at + 1), row.ids[at + 1]));
    return found;
  }

  // What is said after the first tokens of a row and after each further one, if the row's own tokens follow; null if
  // wllama cannot be brought to cut the text into these tokens.
  async force(row, first, count, top) {
    const prompt = part(row, 0, first + 1), rest = part(row, first + 1);
    const end = rest.ids.findIndex((id) => this.wllama.isTokenEOG(id));
    const grammar = literal(textOf(end < 0 ? rest : part(rest, 0, end)));
    const banned = {};
    for (let tries = 0; tries <= MOST_BANS; tries++) {
      const found = [];
      let other = null;
      for await (const token of this.tokens(prompt, count, { n_probs: top, grammar, logit_bias: banned })) {
        if (other !== null || found.length === count) continue; // read to its end, so that the next prompt can begin
        const wanted = rest.ids[found.length] ?? token.id;
        if (token.id === wanted) found.push(token);
        else other = token.id;
      }
      if (found.length === count) return found;
      const at = first + found.length;
      if (other !== null && this.wllama.isTokenEOG(row.ids[at + 1]) && found.length === count - 1) {
        return [...found, await this.chosen(part(row, 0, at + 1), row.ids[at + 1])]; // another end of a turn
      }
      if (other === null || rest.ids.includes(other)) break;
      banned[other] = BAN;
    }
    return null;
  }

  // What is said after a prompt, with the probability of one token.
  async chosen(prompt, next) {
    for await (const token of this.tokens(prompt, 1, { n_probs: TOPS[0] })) {
      const known = token.top_logprobs.find(({ id }) => id === next) ?? token.top_logprobs.at(-1); // at most that
      return { ...token, id: next, logprob: known.logprob };
    }
  }
}

const nothing = () => ({ next_logprob: [], argmax: [], top_logprob: [] });

// Tokens of a row; `pieces` hold the bytes of each as characters.
const part = (row, from, to) => ({ ids: row.ids.slice(from, to), pieces: row.pieces.slice(from, to) });

// `exact`: refuse a text that does not end with a whole character.
function textOf({ pieces }, exact = true) {
  const bytes = Uint8Array.from(pieces.join(''), (character) => character.charCodeAt(0));
  return new TextDecoder('utf-8', { fatal: exact, ignoreBOM: true }).decode(bytes);
}

// A grammar (GBNF) of one text alone.
function literal(text) {
  const code = (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, '0')}`;
  return `root ::= "${text.replace(/[\\"]/g, '\\$&').replace(/[\u0000-\u001f\u007f]/g, code)}"`;
}
