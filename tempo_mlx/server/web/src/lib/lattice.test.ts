import { describe, expect, it } from 'vitest'
import { capital, large, run, step, token } from '../testing/runs'
import { aliveWidth, entropy, Lattice } from './lattice'

const texts = (lattice: Lattice, path: number[]) => path.map((i) => lattice.members[i]!.token.text)

describe('best path', () => {
  it('follows the edges, not the most probable member of each set', () => {
    const lattice = Lattice.of(
      run([
        step(0, [token('a', 0.6, 6), token('b', 0.4, 5)]),
        step(1, [
          token('x', 0.5, 8, [
            [6, 0.1, 0.1],
            [5, 0.9, 0.9],
          ]),
          token('y', 0.3, 7, [
            [6, 1, 0.5],
            [5, 0, 0.01],
          ]),
        ]),
      ]),
    )
    expect(texts(lattice, lattice.bestPath())).toEqual(['b', 'x']) // .4*.9 > .6*.5 > .6*.1
  })

  it('leaves removed members out, unless their whole set was removed', () => {
    expect(texts(Lattice.of(capital()), Lattice.of(capital()).bestPath())).toEqual([' Paris', '.', '<|im_end|>'])
    const gone = capital()
    const why = { signal: 'posterior', score: 0, threshold: 1, unattended: false }
    gone.steps[0]!.tokens.forEach((t) => Object.assign(t, { removed_after: 1, removed_why: why }))
    expect(texts(Lattice.of(gone), Lattice.of(gone).bestPath())).toHaveLength(3)
  })

  it('changes when a member is removed later', () => {
    const lattice = Lattice.of(capital())
    lattice.bestPath()
    expect(lattice.update(6, { removed_after: 2 })).toBe(0)
    lattice.update(5, { removed_after: null, removed_why: null })
    expect(texts(lattice, lattice.bestPath())[0]).toBe(' known')
  })

  it('grows step by step to what it is for the whole run', () => {
    const whole = large(60, 6)
    const growing = new Lattice()
    for (const s of whole.steps) {
      growing.append(s)
      growing.bestPath()
    }
    expect(growing.bestPath()).toEqual(Lattice.of(whole).bestPath())
    expect(growing.bestPath()).toHaveLength(60)
  })

  it('of branches is the one with the best mean, though it ended early', () => {
    const on = (text: string, p: number, slot: number | null, branch: number, parent?: number) => ({
      ...token(text, p, slot, parent === undefined ? [] : [[parent, 1, p]]),
      branch,
    })
    const lattice = Lattice.of(
      run([
        step(0, [on('a', 0.9, 6, 0), on('b', 0.1, 5, 1)]),
        step(1, [on('end', 0.9, null, 0, 6), on('c', 0.9, 7, 1, 5)]),
        step(2, [on('d', 0.9, 8, 1, 7)]),
      ]),
    )
    expect(texts(lattice, lattice.bestPath())).toEqual(['a', 'end'])
  })

  it('finds where a given path runs', () => {
    const lattice = Lattice.of(capital())
    const ids = [' Paris', ' for'].map((text) => token(text, 0, 0).id)
    expect(texts(lattice, lattice.locate(ids))).toEqual([' Paris', ' for'])
    expect(lattice.locate([1, 2])).toEqual([])
  })
})

describe('lineage', () => {
  it('is the chance that a path through a member used each earlier one', () => {
    const lattice = Lattice.of(capital())
    const end = lattice.members.findIndex((m) => m.token.text === ' It')
    const gamma = lattice.ancestry(end)
    const of = (text: string) => gamma.get(lattice.members.findIndex((m) => m.token.text === text))
    expect(of('.')).toBeCloseTo(0.7)
    expect(of(' Paris')).toBeCloseTo(0.7 * 0.98 + 0.2 * 0.1 + 0.1 * 0.4)
    expect((of(' Paris') ?? 0) + (of(' known') ?? 0)).toBeCloseTo(1)
  })

  it('forwards is the share of later members that comes through this one', () => {
    const lattice = Lattice.of(capital())
    const known = lattice.memberAtSlot(5)!
    const share = lattice.descent(known.index)
    expect(share.get(lattice.memberAtSlot(8)!.index)).toBeCloseTo(0.9)
    expect(share.get(lattice.memberAtSlot(10)!.index)).toBeCloseTo(0.7 * 0.02 + 0.2 * 0.9 + 0.1 * 0.6)
  })
})

it('width counts the alive, entropy includes the residual mass', () => {
  const first = capital().steps[0]!
  expect(aliveWidth(first)).toBe(1)
  expect(entropy(step(0, [token('a', 0.5, 5)]))).toBeCloseTo(1)
  expect(entropy(step(0, [token('a', 1, 5)]))).toBe(0)
})

it('takes 500 sets of 8 in no time', () => {
  const whole = large(500, 8)
  const times = Array.from({ length: 5 }, () => {
    const start = performance.now()
    const lattice = Lattice.of(whole)
    lattice.bestPath()
    lattice.ancestry(lattice.members.length - 1)
    return performance.now() - start
  })
  expect(Math.min(...times)).toBeLessThan(250) // the best of five: the machine may be busy with other things
})
