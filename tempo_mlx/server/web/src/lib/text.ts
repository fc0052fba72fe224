/** Text as people read it: sets inline, whitespace and parts of characters made visible. */

import type { Lattice, Member } from './lattice'
import { endsText, isShown } from './run'

/** Stands for bytes that are no whole character. */
export const REPLACEMENT = '\uFFFD'

/** One set in the inline text. */
export interface Segment {
  step: number
  /** `plain`: one member, read as text; `set`: several; `end`: a lone end of text; `none`: nothing is shown */
  kind: 'plain' | 'set' | 'end' | 'none'
  /** blanks that all members begin with */
  lead: string
  items: { member: Member; text: string }[]
  removed: Member[]
  /** index of the member on the best path */
  best: number | undefined
}

/** As pieces() in report/text.py: the blanks that all texts begin with, and what follows them. */
export function alternatives(texts: readonly string[]): [lead: string, rest: string[]] {
  const blanks = Math.min(...texts.map((text) => /^ */.exec(text)![0].length))
  return [' '.repeat(blanks), texts.map((text) => text.slice(blanks))]
}

export function segment(lattice: Lattice, step: number, best?: number): Segment {
  const members = lattice.membersOf(step)
  const shown = members.filter((member) => isShown(member.token))
  const removed = members.filter((member) => !isShown(member.token))
  if (shown.length === 0) return { step, kind: 'none', lead: '', items: [], removed, best }
  if (shown.length === 1) {
    const member = shown[0]!
    const kind = endsText(member.token) ? 'end' : 'plain'
    return { step, kind, lead: '', items: [{ member, text: member.token.text }], removed, best }
  }
  const [lead, rest] = alternatives(shown.map((member) => member.token.text))
  const items = shown.map((member, i) => ({ member, text: rest[i]! }))
  return { step, kind: 'set', lead, items, removed, best }
}

/** What a segment prints in the run's `text`. */
export function printed(segment: Segment): string {
  if (segment.kind === 'plain') return segment.items[0]!.text
  if (segment.kind !== 'set') return ''
  return `${segment.lead}[${segment.items.map((item) => escapeBreaks(item.text)).join('/')}]`
}

/** What a segment adds to the best path's text. */
export function printedBest(segment: Segment): string {
  if (segment.kind === 'none' || segment.kind === 'end') return ''
  const item = segment.items.find((i) => i.member.index === segment.best) ?? segment.items[0]!
  return endsText(item.member.token) ? '' : segment.lead + item.text
}

/** The segments up to where the run's text ends: before a stop string, in the midst of a token maybe. */
export function upTo(segments: readonly Segment[], text: string): Segment[] {
  let at = 0
  for (const [index, segment] of segments.entries()) {
    const own = printed(segment)
    if (!text.startsWith(own, at)) {
      const item = segment.items.find((i) => i.member.index === segment.best) ?? segment.items[0]!
      const rest: Segment = { ...segment, kind: 'plain', lead: '', items: [{ ...item, text: text.slice(at) }] }
      return [...segments.slice(0, index), rest]
    }
    at += own.length
  }
  return [...segments]
}

function escapeBreaks(text: string): string {
  return text.replaceAll('\n', '\\n').replaceAll('\r', '\\r').replaceAll('\t', '\\t')
}

const NAMES: Record<string, string> = {
  AD: 'SHY', '200B': 'ZWSP', '200C': 'ZWNJ', '200D': 'ZWJ', '200E': 'LRM', '200F': 'RLM', '202A': 'LRE', '202B': 'RLE', '202C': 'PDF',
  '202D': 'LRO', '202E': 'RLO', '2060': 'WJ', '2066': 'LRI', '2067': 'RLI', '2068': 'FSI', '2069': 'PDI', FEFF: 'BOM',
} // prettier-ignore

/** Characters that turn the direction of what follows them. */
const TURNING = /[\u202A-\u202E\u2066-\u2069]/g
// eslint-disable-next-line no-control-regex -- these are what is looked for
const CONTROLS = /[\0-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F\xAD\u200B\u2060\uFEFF\u202A-\u202E\u2066-\u2069]/g
/** What joins characters has no width of its own, and shows in what it joins. */
const JOINING = /[\u200C-\u200F]|[\uFE00-\uFE0F]/g

function named(character: string): string {
  const code = character.codePointAt(0)!.toString(16).toUpperCase()
  return `‹${NAMES[code] ?? `U+${code.padStart(4, '0')}`}›`
}

/** For reading: what would turn the line around is named instead. */
export function readable(text: string): string {
  return text.replace(TURNING, named)
}

/** Whitespace, bytes and what has no width made visible: `·` for a space, `⏎`, `⇥`, `▯` for a part of a character. */
export function visible(text: string): string {
  const joiners = text.replace(JOINING, '').trim() === ''
  return (joiners ? text.replace(JOINING, named) : text)
    .replace(CONTROLS, named)
    .replaceAll(' ', '·')
    .replaceAll('\r', '␍')
    .replaceAll('\n', '⏎')
    .replaceAll('\t', '⇥')
    .replaceAll('\u00A0', '⍽')
    .replaceAll(REPLACEMENT, '▯')
}

/** `visible` for reading: line breaks stay breaks behind their sign. */
export function visibleLines(text: string): string {
  return visible(text).replaceAll('⏎', '⏎\n')
}

const LONGEST = 100

/**
 * How a member is named where space is short; never empty. On the best path a character that spans several tokens is
 * the text of the last of them, so the others have none.
 */
export function label(member: Member): string {
  if (endsText(member.token)) return 'end'
  const text = visible(member.token.text)
  return text.length > LONGEST ? `${cut(text, LONGEST)}…` : text || '▯'
}

/** How a text begins; a character of two units is not cut in the middle. */
export function cut(text: string, length: number): string {
  return text.slice(0, length).replace(/[\uD800-\uDBFF]$/, '')
}

/** The first words of a text. */
export function briefly(text: string, longest = 40): string {
  const words = text.trim().replace(/\s+/g, ' ')
  return words.length > longest ? `${cut(words, longest - 1)}…` : words
}
