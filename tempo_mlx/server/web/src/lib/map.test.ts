import { expect, it } from 'vitest'
import { turn } from '../testing/turns'
import { mapOf, neighbour, type Place } from './map'

/** A first question asked in two ways; the first with two answers, of which the first was asked on from, twice. */
const TREE = [
  turn('q1', null),
  turn('a1', 'q1'),
  turn('q2', 'a1'),
  turn('a2', 'q2'),
  turn('q2b', 'a1'),
  turn('a1b', 'q1'),
  turn('q0', null),
]
const grid = (places: Place[]) => Object.fromEntries(places.map((p) => [p.turn.id, [p.row, p.column]]))

it('no two turns stand in one place, what comes first goes straight on, and branches never cross', () => {
  const places = mapOf({ shown: {} }, TREE)
  expect(grid(places)).toEqual({
    q1: [0, 0],
    a1: [1, 0],
    q2: [2, 0],
    a2: [3, 0],
    q2b: [2, 1],
    a1b: [1, 2],
    q0: [0, 3],
  })
  expect(new Set(places.map(({ row, column }) => `${row} ${column}`)).size).toBe(TREE.length)
})

it('what is shown is marked, and only that', () => {
  const shown = (choice: Record<string, string>) =>
    mapOf({ shown: choice }, TREE)
      .filter((place) => place.shown)
      .map((place) => place.turn.id)
  expect(shown({})).toEqual(['q0'])
  expect(shown({ '': 'q1', q1: 'a1', a1: 'q2' })).toEqual(['q1', 'a1', 'q2', 'a2'])
})

it('arrow keys lead along the branch that is shown, back, and to the nearest beside', () => {
  const places = mapOf({ shown: { '': 'q1', q1: 'a1', a1: 'q2' } }, TREE)
  const go = (from: string, key: string) =>
    neighbour(
      places,
      places.find((place) => place.turn.id === from)!,
      key,
    )?.turn.id ?? null
  expect(go('q1', 'ArrowDown')).toBe('a1')
  expect(go('a1', 'ArrowDown')).toBe('q2')
  expect(go('q2', 'ArrowUp')).toBe('a1')
  expect(go('q1', 'ArrowUp')).toBeNull()
  expect(go('a1', 'ArrowRight')).toBe('a1b')
  expect(go('q0', 'ArrowLeft')).toBe('q1')
  expect(go('q2', 'ArrowLeft')).toBeNull()
  expect(go('a1b', 'ArrowDown')).toBeNull()
  expect(go('q1', 'x')).toBeNull()
})
