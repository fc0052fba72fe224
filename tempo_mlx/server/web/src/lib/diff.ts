/** What differs between two texts or two sets of settings. */

import { diffArrays } from 'diff'
import type { Value, Values } from './run'

export interface Part {
  text: string
  /** only in the second text */
  added: boolean
  /** only in the first */
  removed: boolean
}

/** Word by word, with word boundaries as the reader's language has them; whitespace counts. */
export function diffText(from: string, to: string): Part[] {
  return diffArrays(words(from), words(to)).map((change) => ({
    text: change.value.join(''),
    added: change.added ?? false,
    removed: change.removed ?? false,
  }))
}

function words(text: string): string[] {
  return [...new Intl.Segmenter(undefined, { granularity: 'word' }).segment(text)].map((part) => part.segment)
}

export interface Difference {
  name: string
  left: Value | undefined
  right: Value | undefined
}

export function diffValues(left: Values, right: Values): Difference[] {
  const names = new Set([...Object.keys(left), ...Object.keys(right)])
  return [...names]
    .filter((name) => JSON.stringify(left[name]) !== JSON.stringify(right[name]))
    .map((name) => ({ name, left: left[name], right: right[name] }))
}
