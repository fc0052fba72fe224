/** What can be shown: a run file, a run with its phrases, or the answers that `ask` wrote. */

import { isAnswers, type Answers } from './answers'
import { checkRun, RunFileError, type Phrase, type Run } from './run'

export interface Shown {
  /** null: given answers were weighed, without generating */
  run: Run | null
  /** the run as phrases, which Python reads off it; none where it was not asked */
  phrases: Phrase[]
  answers: Answers | null
}

/** As one file: what `parseShown` reads. */
export function fileOf({ run, phrases, answers }: Shown): object {
  return answers ? { ...answers, run } : { run, phrases }
}

export function parseShown(text: string): Shown {
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch {
    throw new RunFileError('This file is not JSON, so it is no run file.')
  }
  return checkShown(value)
}

export function checkShown(value: unknown): Shown {
  const file = (typeof value === 'object' && value !== null ? value : {}) as Record<string, unknown>
  if ('answers' in file) {
    if (!isAnswers(file)) throw new RunFileError('This file of answers is damaged.')
    const answers = file as unknown as Answers
    return { run: file.run ? checkRun(file.run) : null, phrases: [], answers }
  }
  if (!('run' in file)) return { run: checkRun(value), phrases: [], answers: null }
  const phrases = (file.phrases ?? []) as Phrase[]
  if (!Array.isArray(phrases) || !phrases.every(isPhrase))
    throw new RunFileError('The phrases of this run are damaged.')
  return { run: checkRun(file.run), phrases, answers: null }
}

function isPhrase(value: Partial<Phrase> | null): boolean {
  if (typeof value?.text !== 'string' || !Array.isArray(value.alternatives)) return false
  return value.alternatives.every((one) => typeof one?.text === 'string' && Array.isArray(one.slots))
}
