/** Where everything in the lattice view lies, in world units (pixels at zoom 1). Grows step by step. */

import type { Lattice, Member } from '../lib/lattice'
import { label } from '../lib/text'

export const CELL_HEIGHT = 24
export const PITCH = 29
export const HEADER = 38
/** between columns: room for the edges */
export const GAP = 34
export const MARGIN = 16
const PADDING = 9
/** room for the percentage behind the label */
const NUMBER = 26
const NARROWEST = 58
const WIDEST = 170

/** How wide a text is drawn. */
export type Measure = (text: string) => number

export function heightOf(rows: number): number {
  return HEADER + rows * PITCH + MARGIN
}

export class Layout {
  /** left edge of each column */
  readonly x: number[] = []
  readonly width: number[] = []
  /** most members in a column */
  rows = 1

  constructor(
    readonly lattice: Lattice,
    private readonly measure: Measure,
  ) {
    this.grow()
  }

  /** Lay out the steps that came since. */
  grow(): void {
    for (let step = this.x.length; step < this.lattice.length; step++) {
      const members = this.lattice.membersOf(step)
      const text = Math.max(0, ...members.map((member) => this.measure(label(member))))
      this.x.push(this.right)
      this.width.push(Math.ceil(Math.min(WIDEST, Math.max(NARROWEST, text + 2 * PADDING + NUMBER))))
      this.rows = Math.max(this.rows, members.length)
    }
  }

  /** Where the next column begins. */
  get right(): number {
    const last = this.x.length - 1
    return last < 0 ? MARGIN : this.x[last]! + this.width[last]! + GAP
  }

  get extent(): { width: number; height: number } {
    return { width: Math.max(this.right - GAP, MARGIN) + MARGIN, height: heightOf(this.rows) }
  }

  top(rank: number): number {
    return HEADER + rank * PITCH
  }

  /** Steps whose columns, with the edges into them, meet the interval from `left` to `right`. */
  visible(left: number, right: number): [first: number, end: number] {
    const first = Math.max(0, this.columnAt(left - GAP))
    return [first, Math.min(this.x.length, this.columnAt(right) + 2)]
  }

  /** The last column that begins at or before `x`; -1 before the first. */
  columnAt(x: number): number {
    let low = 0
    let high = this.x.length
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.x[middle]! <= x) low = middle + 1
      else high = middle
    }
    return low - 1
  }

  /** The member at a point. */
  hit(x: number, y: number): Member | null {
    const step = this.columnAt(x)
    const rank = Math.floor((y - HEADER) / PITCH)
    if (step < 0 || rank < 0 || x > this.x[step]! + this.width[step]!) return null
    const index = this.lattice.first[step]! + rank
    return index < this.lattice.first[step + 1]! ? this.lattice.members[index]! : null
  }
}
