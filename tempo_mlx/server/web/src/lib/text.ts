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

/** Whitespace and bytes made visible: `·` for a space, `⏎`, `⇥`, `▯` for a part of a character. */
export function visible(text: string): string {
  return text
    .replaceAll(' ', '·')
    .replaceAll('\r', '␍')
    .replaceAll('\n', '⏎')
    .replaceAll('\t', '⇥')
    .replaceAll('\u00A0', '⍽')
    .replaceAll('\u200B', '∅')
    .replaceAll(REPLACEMENT, '▯')
}

/** `visible` for reading: line breaks stay breaks behind their sign. */
export function visibleLines(text: string): string {
  return visible(text).replaceAll('⏎', '⏎\n')
}

/**
 * How a member is named where space is short; never empty. On the best path a character that spans several tokens is
 * the text of the last of them, so the others have none.
 */
export function label(member: Member): string {
  if (endsText(member.token)) return 'end'
  return visible(member.token.text) || '▯'
}
