import { describe, expect, it } from 'vitest'
import { capital, run, step, token } from '../testing/runs'
import { Lattice } from './lattice'
import type { Run } from './run'
import { alternatives, label, printed, segment, visible, visibleLines } from './text'

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
