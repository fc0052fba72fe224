/** The whole tree of a conversation on a grid: a row for each turn, a column for each branch. */

import { after, pathOf, type Talk, type Turn } from './talk'

export interface Place {
  turn: Turn
  row: number
  column: number
  before: Place | null
  /** leads to what is shown, or is it */
  shown: boolean
}

/** What was said first goes straight on; what was said instead stands to the right of all that came of it. */
export function mapOf(talk: Pick<Talk, 'shown'>, turns: readonly Turn[]): Place[] {
  const path = new Set(pathOf(talk, turns).map(({ id }) => id))
  const places: Place[] = []
  let next = 0
  function put(parent: string | null, before: Place | null): void {
    for (const [at, turn] of after(turns, parent).entries()) {
      const column = before && at === 0 ? before.column : next++
      const place = { turn, row: before ? before.row + 1 : 0, column, before, shown: path.has(turn.id) }
      places.push(place)
      put(turn.id, place)
    }
  }
  put(null, null)
  return places
}

const AWAY: Record<string, [rows: number, columns: number]> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
}

/** Where an arrow key leads: to what was said before, to what is shown or newest of what follows, or to a neighbour. */
export function neighbour(places: readonly Place[], from: Place, key: string): Place | null {
  const [rows, columns] = AWAY[key] ?? [0, 0]
  if (rows < 0) return from.before
  const following = places.filter(({ before }) => before === from)
  if (rows > 0) return following.find(({ shown }) => shown) ?? following.at(-1) ?? null
  const beside = places.filter(({ row, column }) => row === from.row && (column - from.column) * columns > 0)
  const distance = ({ column }: Place) => Math.abs(column - from.column)
  return beside.sort((a, b) => distance(a) - distance(b))[0] ?? null
}
