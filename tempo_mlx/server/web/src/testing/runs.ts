/** Runs for tests: a small one written by hand, and large ones that are made up but consistent. */

import type { Parent, Run, Step, Token } from '../lib/run'

export function token(text: string, probability: number, slot: number | null, parents: Parent[] = []): Token {
  return {
    id: hash(text),
    text,
    probability,
    slot,
    weight: slot === null ? null : probability,
    parents,
    removed_after: null,
    removed_why: null,
    attention: null,
    posterior: null,
  }
}

export function step(index: number, tokens: Token[], more: Partial<Step> = {}): Step {
  const recorded = tokens.reduce((sum, t) => sum + t.probability, 0)
  return {
    step: index,
    position: 5 + index,
    threshold: 0.1,
    exit_layer: null,
    residual_probability: 1 - recorded,
    tokens,
    rejected: [],
    ...more,
  }
}

export function run(steps: Step[], more: Partial<Run> = {}): Run {
  return {
    format: 'tempo-mlx/run',
    version: 1,
    model: { id: 'smollm2-135m', backend: 'mlx', device: 'cpu', dtype: 'float32' },
    versions: { 'tempo-mlx': '1.0.0' },
    decoder: 'superposed',
    config: { threshold: 0.1, seed: 42, max_tokens: steps.length },
    prompt: { text: 'The capital of France is', token_ids: [504, 3575, 282, 4649, 314] },
    steps,
    tree: null,
    reasoning: null,
    text: '',
    final_text: '',
    paths: [],
    finish_reason: 'length',
    timing: { prefill_seconds: 0.05, decode_seconds: 1, tokens_per_second: 12 },
    ...more,
  }
}

/** [Paris/known] -> [./ for/ as] -> end, with " known" removed by the posterior. */
export function capital(): Run {
  const known = token(' known', 0.2, 5)
  known.removed_after = 2
  known.removed_why = { signal: 'posterior', score: 0.04, threshold: 0.1, unattended: false }
  known.posterior = 0.04
  const paris = token(' Paris', 0.6, 6)
  paris.posterior = 0.96
  const parents = (known: number, paris: number, onKnown: number, onParis: number): Parent[] => [
    [6, paris, onParis],
    [5, known, onKnown],
  ]
  return run(
    [
      step(0, [paris, known], { rejected: [{ id: 7, text: ' the', probability: 0.12, why: 'coherence 0.3 < 0.7' }] }),
      step(1, [
        token('.', 0.5, 9, parents(0.02, 0.98, 0.04, 0.65)),
        token(' for', 0.2, 8, parents(0.9, 0.1, 0.72, 0.03)),
        token(' as', 0.15, 7, parents(0.6, 0.4, 0.36, 0.08)),
      ]),
      step(2, [
        token('<|im_end|>', 0.7, null, [
          [9, 0.9, 0.8],
          [8, 0.06, 0.2],
          [7, 0.04, 0.2],
        ]),
        token(' It', 0.2, 10, [
          [9, 0.7, 0.18],
          [8, 0.2, 0.14],
          [7, 0.1, 0.1],
        ]),
      ]),
    ],
    { text: ' Paris[./ for/ as][<|im_end|>/ It]', final_text: ' Paris.', finish_reason: 'stop' },
  )
}

const WORDS = ' the of and to in was is for as with known capital city river people century located Paris France north'
  .split(' ')
  .slice(1)

/** A made-up run of `count` sets of `width` members, of which about a third are removed. The same for the same seed. */
export function large(count: number, width: number, seed = 1): Run {
  const random = generator(seed)
  const steps: Step[] = []
  let slot = 5
  let before: Token[] = []
  for (let index = 0; index < count; index++) {
    const size = index === 0 ? width : 1 + Math.floor(random() * width)
    const raw = Array.from({ length: size }, () => random() ** 3 + 0.02).sort((a, b) => b - a)
    const total = raw.reduce((a, b) => a + b, 0) * (1.05 + random())
    const tokens = raw.map((share, rank) => {
      const parents = before.map((p): Parent => [p.slot!, p.weight! * (0.2 + random()), random() * 0.8 + 0.01])
      const sum = parents.reduce((s, p) => s + p[1], 0)
      for (const parent of parents) parent[1] /= sum
      const text = ` ${WORDS[Math.floor(random() * WORDS.length)]!}${rank > 3 ? rank : ''}`
      return { ...token(text, share / total, slot + size - 1 - rank, parents), posterior: random() }
    })
    const kept = tokens.reduce((s, t) => s + t.probability, 0)
    for (const t of tokens) t.weight = t.probability / kept
    for (const t of tokens.slice(1)) {
      if (index < count - 4 && random() < 0.4) {
        t.removed_after = index + 3
        t.removed_why = { signal: 'posterior', score: 0.03, threshold: 0.1, unattended: false }
      }
    }
    slot += size
    before = tokens
    steps.push(step(index, tokens, { position: 5 + index }))
  }
  return run(steps)
}

function generator(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}

function hash(text: string): number {
  let value = 7
  for (const character of text) value = (value * 31 + character.codePointAt(0)!) % 49152
  return value
}
