import { describe, expect, it } from 'vitest'
import { capital, run, step, token } from '../testing/runs'
import { Lattice } from './lattice'
import type { Run } from './run'
import { alternatives, joinCharacters, joinSegments, printed, segment, visible, visibleLines } from './text'

const segments = (r: Run) => {
  const lattice = Lattice.of(r)
  return r.steps.map((_, i) => segment(lattice, i))
}

describe('inline text', () => {
  it('prints what the run file prints', () => {
    expect(segments(capital()).map(printed).join('')).toBe(capital().text)
  })

  it('takes the shared space out of a set, but no line break', () => {
    expect(alternatives([' was', ' is'])).toEqual([' ', ['was', 'is']])
    expect(alternatives([' was', 'is'])).toEqual(['', [' was', 'is']])
    expect(alternatives(['\n', '\n\n'])).toEqual(['', ['\n', '\n\n']])
  })

  it('shows nothing for a lone end and for a set that is gone', () => {
    const gone = { ...token('x', 1, 5), removed_after: 1 }
    const [none, end] = segments(run([step(0, [gone]), step(1, [token('</s>', 1, null)])]))
    expect(none!.kind).toBe('none')
    expect(end!.kind).toBe('end')
    expect(printed(end!)).toBe('')
  })
})

describe('characters over several tokens', () => {
  it('are put together at their last token', () => {
    expect(joinCharacters([' a', '\uFFFD', '\uFFFD', '!'], ' a\u{1F30D}!')).toEqual([' a', '', '\u{1F30D}', '!'])
    expect(joinCharacters(['\uFFFD', '\uFFFD'], '\u00E9')).toEqual(['', '\u00E9'])
    expect(joinCharacters([' \uFFFD', '\uFFFD', ' x'], ' \u{1F30D} x')).toEqual(['', ' \u{1F30D}', ' x'])
  })

  it('stay as they are where the text is another', () => {
    expect(joinCharacters(['a', '\uFFFD', 'c'], 'b?d')).toEqual(['a', '\uFFFD', 'c'])
  })

  it('tolerate a dropped first space', () => {
    expect(joinCharacters([' a', '\uFFFD', '\uFFFD'], 'a\u00E9')).toEqual([' a', '', '\u00E9'])
  })

  it('are joined in the segments of a run', () => {
    const parts = run([step(0, [token('\uFFFD', 0.9, 5)]), step(1, [token('\uFFFD', 0.9, 6)])], { text: '\u00E9' })
    expect(joinSegments(segments(parts), parts.text).map((s) => s.items[0]!.text)).toEqual(['', '\u00E9'])
  })
})

it('makes whitespace and bytes visible', () => {
  expect(visible(' a\n\t\uFFFD')).toBe('·a⏎⇥▯')
  expect(visibleLines('a\n')).toBe('a⏎\n')
})
