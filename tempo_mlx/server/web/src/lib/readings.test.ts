/** The same cases as tests/test_readings.py: the page reads a lattice as Python does. */

import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { Lattice } from './lattice'
import type { Run } from './run'
import { printed, printedBest, segment, upTo } from './text'

interface Case {
  name: string
  run: Run
  /** the rank, in each set, of the member on the best path, and on each of the run's paths */
  best: number[]
  paths: number[][]
}

const file = new URL('../../../../../tests/readings.json', import.meta.url)
const cases = JSON.parse(readFileSync(file, 'utf8')) as Case[]

const ranks = (lattice: Lattice, path: number[]) => path.map((index) => lattice.members[index]!.rank)

describe.each(cases)('$name', ({ run, best, paths }) => {
  const lattice = Lattice.of(run)

  it('has the best path', () => {
    expect(ranks(lattice, lattice.bestPath())).toEqual(best)
  })

  it('has the paths', () => {
    expect(run.paths.map((path) => ranks(lattice, lattice.locate(path.token_ids)))).toEqual(paths)
  })

  it('has the text', () => {
    if (run.decoder !== 'superposed') return
    const path = lattice.bestPath()
    const segments = run.steps.map((_, step) => segment(lattice, step, path[step]))
    const shown = upTo(segments, run.text)
    expect(shown.map(printed).join('')).toBe(run.text)
    expect(shown.map(printedBest).join('')).toBe(run.final_text)
    if (run.config.stop === undefined) expect(shown).toEqual(segments)
  })

  it('grows to the same', () => {
    const growing = new Lattice()
    for (const step of run.steps) {
      growing.append(step)
      growing.bestPath()
    }
    expect(ranks(growing, growing.bestPath())).toEqual(best)
  })
})
