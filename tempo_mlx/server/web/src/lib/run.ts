/** Checking run files; what stands in them is described in run-file.ts. */

import type { Run, Token, Values } from './run-file'

export type { Path, Rejected, Removal, Run, Step, Token, Value, Values } from './run-file'

/** slot of a row of the previous step, P(i|j), P(j|i) */
export type Parent = Token['parents'][number]

/** What some readings have instead of a phrase, as report/phrases.py finds it. */
export interface Alternative {
  text: string
  /** of all readings */
  share: number
  /** of the most probable such reading */
  slots: (number | null)[]
  /** how that reading goes on, as far as readings differ */
  follows: string
}

/** A stretch of the best reading; where others are probable, what they have instead: a fork. */
export interface Phrase {
  text: string
  share: number | null
  alternatives: Alternative[]
  /** the steps its tokens are of, `end` excluded */
  start: number
  end: number
}

/** A file that is not a run; the message is a sentence for the reader. */
export class RunFileError extends Error {}

/** Enough checking that no view can fail on what passes; the Python side checks the rest. */
export function checkRun(value: unknown): Run {
  if (!isObject(value) || value.format !== 'tempo-mlx/run') {
    throw new RunFileError('This is no run file: its "format" is not "tempo-mlx/run".')
  }
  if (value.version !== 1) {
    throw new RunFileError(`This run file has version ${String(value.version)}; this page reads version 1.`)
  }
  const prompt = value.prompt
  need(isObject(prompt) && typeof prompt.text === 'string' && Array.isArray(prompt.token_ids), 'prompt')
  for (const name of ['model', 'versions', 'config', 'timing']) need(isObject(value[name]), name)
  for (const name of ['decoder', 'text', 'final_text', 'finish_reason']) need(typeof value[name] === 'string', name)
  need(value.early_exit === undefined || isObject(value.early_exit), 'early_exit')
  need(value.reasoning === null || typeof value.reasoning === 'string', 'reasoning')
  need(Array.isArray(value.steps), 'steps')
  ;(value.steps as unknown[]).forEach(checkStep)
  need(Array.isArray(value.paths), 'paths')
  for (const path of value.paths as unknown[]) {
    need(isObject(path) && Array.isArray(path.token_ids), 'paths')
    need(typeof path.text === 'string' && isNumber(path.logprob), 'paths')
  }
  return value as unknown as Run
}

function checkStep(step: unknown, index: number): void {
  const where = `step ${index}`
  need(isObject(step) && step.step === index && isNumber(step.position), where)
  need(isNumber(step.residual_probability) && isNullOrNumber(step.threshold), where)
  need(isNullOrNumber(step.exit_layer) && Array.isArray(step.tokens) && Array.isArray(step.rejected), where)
  for (const token of step.tokens as unknown[]) {
    need(isObject(token) && typeof token.text === 'string' && isNumber(token.id), where)
    need(isNumber(token.probability) && isNullOrNumber(token.slot), where)
    need(isNullOrNumber(token.weight) && isNullOrNumber(token.attention) && isNullOrNumber(token.posterior), where)
    need(isNullOrNumber(token.removed_after) && Array.isArray(token.parents), where)
    for (const parent of token.parents as unknown[]) {
      need(Array.isArray(parent) && parent.length === 3 && parent.every(isNumber), where)
    }
    const why = token.removed_why
    need(why === null || (isObject(why) && typeof why.signal === 'string'), where)
    need(why === null || (isNumber(why.score) && isNumber(why.threshold)), where)
  }
  for (const item of step.rejected as unknown[]) {
    need(isObject(item) && typeof item.text === 'string' && isNumber(item.probability), where)
    need(typeof item.why === 'string', where)
  }
}

function need(condition: boolean, where: string): asserts condition {
  if (!condition) throw new RunFileError(`This run file is damaged: ${where} is missing or malformed.`)
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isNumber(value: unknown): value is number {
  return typeof value === 'number' && Number.isFinite(value)
}

function isNullOrNumber(value: unknown): value is number | null {
  return value === null || isNumber(value)
}

/** Alive, or removed but kept as its set's token in the text. */
export function isShown(token: Token): boolean {
  return token.removed_after === null || token.removed_why?.unattended === true
}

export function endsText(token: Token): boolean {
  return token.slot === null
}

export function numberOf(values: Values, name: string): number | null {
  const value = values[name]
  return typeof value === 'number' ? value : null
}
