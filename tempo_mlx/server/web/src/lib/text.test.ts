import { describe, expect, it } from 'vitest'
import { shorten } from '../lattice/canvas'
import { capital, run, step, token } from '../testing/runs'
import { Lattice } from './lattice'
import type { Run } from './run'
import { briefly, alternatives, cut, label, printed, readable, segment, visible, visibleLines } from './text'

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

it('names a member that has no text of its own', () => {
  const parts = run([step(0, [token('', 0.9, 5)]), step(1, [token('\uFFFD', 0.9, 6)])])
  expect(Lattice.of(parts).members.map(label)).toEqual(['▯', '▯'])
})

it('makes whitespace and bytes visible', () => {
  expect(visible(' a\n\t\uFFFD')).toBe('·a⏎⇥▯')
  expect(visibleLines('a\n')).toBe('a⏎\n')
})

describe('what cannot be seen', () => {
  it('has a label where it would turn the line, and where it is all there is', () => {
    expect(readable('abc\u202Edcba')).toBe('abc‹RLO›dcba')
    expect(visible('\u200D')).toBe('‹ZWJ›')
    expect(visible('\u0007\u001B[31m')).toBe('‹U+0007›‹U+001B›[31m')
    expect(visible('न\u200Dम')).toBe('न\u200Dम')
  })

  it('is shortened in few measurements, however long it is', () => {
    let measured = 0
    const width = (text: string) => (measured++, text.length)
    expect(shorten('x'.repeat(20_000), 10, width)).toBe(`${'x'.repeat(9)}…`)
    expect(measured).toBeLessThan(20)
    expect(shorten('short', 10, width)).toBe('short')
  })
})

it('a name is the first words', () => {
  expect(briefly('  What \n is it? ')).toBe('What is it?')
  expect(briefly('x'.repeat(50))).toHaveLength(40)
})

it('a character of two units is not cut in the middle', () => {
  expect(briefly(`${'a'.repeat(30)}🦊🦊`, 32)).toBe(`${'a'.repeat(30)}…`)
  expect(cut('a🦊', 2)).toBe('a')
  expect(cut('a🦊', 3)).toBe('a🦊')
})
