/** Draws the lattice through a Painter, so that the canvas, SVG and PNG show the same. */

import { mass, type Lattice, type Member } from '../lib/lattice'
import { endsText, isShown, type Step } from '../lib/run'
import { label } from '../lib/text'
import type { Palette } from './colours'
import { CELL_HEIGHT, HEADER, type Layout } from './layout'

export type ColourBy = 'probability' | 'posterior' | 'attention'

export interface Painter {
  rect(x: number, y: number, width: number, height: number, style: Shape): void
  /** from the right of one cell to the left of another */
  curve(x0: number, y0: number, x1: number, y1: number, style: Shape): void
  line(x0: number, y0: number, x1: number, y1: number, style: Shape): void
  text(text: string, x: number, y: number, style: Lettering): void
}

export interface Shape {
  fill?: string
  stroke?: string
  width?: number
  opacity?: number
  radius?: number
  dash?: readonly number[]
}

export interface Lettering {
  fill: string
  size: number
  align?: 'left' | 'right'
  bold?: boolean
  italic?: boolean
  opacity?: number
  /** shorten to this width */
  fit?: number
}

export interface Scene {
  lattice: Lattice
  layout: Layout
  palette: Palette
  best: readonly number[]
  colourBy: ColourBy
  selected: number | null
  /** shares of the members that the pointed-at or selected member descends from or leads to */
  lineage: ReadonlyMap<number, number> | null
  /** the step of that member: what leads there is drawn stronger than what follows */
  focusStep: number
  pinned: ReadonlySet<number>
  /** members that a search found */
  found: ReadonlySet<number> | null
}

const FAINTEST_EDGE = 0.04

export function paint(painter: Painter, scene: Scene, zoom: number, first: number, end: number): void {
  paintEdges(painter, scene, first, end)
  paintBestEdges(painter, scene, zoom, first, end)
  for (let step = first; step < end; step++) {
    paintHeader(painter, scene, step)
    for (const member of scene.lattice.membersOf(step)) paintCell(painter, scene, zoom, member)
  }
}

function paintEdges(painter: Painter, scene: Scene, first: number, end: number): void {
  const { lattice, layout, palette, lineage } = scene
  const from = lattice.first[Math.max(1, first)] ?? 0
  for (let index = from; index < (lattice.first[end] ?? 0); index++) {
    const child = lattice.members[index]!
    const gone = !isShown(child.token)
    for (const { member, forward, posterior } of child.parents) {
      const flow = lineage && edgeFlow(lineage, child, member, posterior)
      if (flow === 0 && forward < 0.1) continue
      if (flow === null && forward < FAINTEST_EDGE) continue
      const strength = flow ? Math.max(flow, 0.1) : forward
      const parent = lattice.members[member]!
      painter.curve(
        layout.x[parent.step]! + layout.width[parent.step]!,
        layout.top(parent.rank) + CELL_HEIGHT / 2,
        layout.x[child.step]!,
        layout.top(child.rank) + CELL_HEIGHT / 2,
        {
          stroke: flow ? (child.step <= scene.focusStep ? palette.ink : palette.muted) : palette.line,
          width: 0.75 + 2.75 * strength,
          opacity: flow === 0 ? 0.12 : gone || !isShown(parent.token) ? 0.3 : 0.25 + 0.75 * strength,
        },
      )
    }
  }
}

/** How much of the highlighted lineage runs over an edge: backwards from its child, or onwards from its parent. */
function edgeFlow(lineage: ReadonlyMap<number, number>, child: Member, parent: number, posterior: number): number {
  const there = lineage.get(child.index)
  const here = lineage.get(parent)
  if (there === undefined || here === undefined) return 0
  return Math.min(there, here) * posterior
}

function paintBestEdges(painter: Painter, scene: Scene, zoom: number, first: number, end: number): void {
  const { lattice, layout, palette, best, lineage } = scene
  for (let step = Math.max(1, first); step < Math.min(end, best.length); step++) {
    const parent = lattice.members[best[step - 1]!]!
    const child = lattice.members[best[step]!]!
    painter.curve(
      layout.x[step - 1]! + layout.width[step - 1]!,
      layout.top(parent.rank) + CELL_HEIGHT / 2,
      layout.x[step]!,
      layout.top(child.rank) + CELL_HEIGHT / 2,
      { stroke: palette.accent, width: Math.max(2, 1.2 / zoom), opacity: lineage ? 0.45 : 1 },
    )
  }
}

/** The step's number, and its probability mass: a piece for each member, the rest open. */
function paintHeader(painter: Painter, scene: Scene, step: number): void {
  const { lattice, layout, palette } = scene
  const x = layout.x[step]!
  const width = layout.width[step]!
  const top = HEADER - 13
  const whole = mass(lattice.steps[step]!)
  painter.text(String(step), x, top - 6, { fill: palette.muted, size: 10 })
  const residual = lattice.steps[step]!.residual_probability
  const rest = residual >= 0.005 ? `${percent(residual / whole)} rest` : ''
  painter.text(rest, x + width, top - 6, { fill: palette.muted, size: 10, align: 'right' })
  painter.rect(x, top, width, 5, { fill: palette.ground, stroke: palette.line, width: 0.75, radius: 1.5 })
  let at = x
  for (const member of lattice.membersOf(step)) {
    const piece = (member.token.probability / whole) * width
    const shown = isShown(member.token)
    painter.rect(at, top, Math.max(0, piece - 0.75), 5, {
      fill: shown ? palette.ramp(0.25 + 0.75 * member.token.probability) : palette.line,
      opacity: shown ? 1 : 0.5,
      radius: 1.5,
    })
    at += piece
  }
}

function paintCell(painter: Painter, scene: Scene, zoom: number, member: Member): void {
  const { layout, palette, best, lineage, selected, found, pinned } = scene
  const { token, step } = member
  const x = layout.x[step]!
  const y = layout.top(member.rank)
  const width = layout.width[step]!
  const shown = isShown(token)
  const onBest = best[step] === member.index
  const share = lineage?.get(member.index)
  const value = coloured(scene, member)
  const away = found !== null && !found.has(member.index)
  const opacity = away ? 0.3 : lineage ? 0.3 + 0.7 * Math.sqrt(share ?? 0) : 1
  painter.rect(x, y, width, CELL_HEIGHT, {
    fill: shown ? palette.ramp(value) : palette.ground,
    stroke: onBest ? palette.accent : shown ? palette.ramp(Math.min(1, value + 0.3)) : palette.line,
    width: onBest ? Math.max(1.75, 1 / zoom) : 1,
    dash: shown ? undefined : [3, 2.5],
    radius: 5,
    opacity,
  })
  const ink = shown ? palette.inkOn(value) : palette.muted
  const middle = y + CELL_HEIGHT / 2 + 4
  const end = endsText(token)
  painter.text(label(member), x + 9, middle, {
    fill: ink,
    size: 12.5,
    bold: onBest,
    italic: end,
    opacity,
    fit: width - 44,
  })
  painter.text(percent(token.probability), x + width - 7, middle, {
    fill: ink,
    size: 10,
    align: 'right',
    opacity,
  })
  if (!shown) {
    painter.line(x + 6, y + CELL_HEIGHT / 2, x + width - 32, y + CELL_HEIGHT / 2, { stroke: palette.muted, opacity })
  }
  if (token.slot !== null && pinned.has(token.slot)) {
    painter.rect(x + width - 7, y - 3, 9, 9, { fill: palette.accent, stroke: palette.ground, width: 1.5, radius: 4.5 })
  }
  if (member.index === selected) {
    painter.rect(x - 3, y - 3, width + 6, CELL_HEIGHT + 6, { stroke: palette.ink, width: 2, radius: 7 })
  }
}

/** What colours a member, from 0 to 1. Attention is held against the largest of its set. */
function coloured(scene: Scene, { token, step }: Member): number {
  if (scene.colourBy === 'probability') return token.probability
  if (scene.colourBy === 'posterior') return token.posterior ?? 0
  const most = largestAttention(scene.lattice.steps[step]!)
  return most > 0 ? (token.attention ?? 0) / most : 0
}

function largestAttention(step: Step): number {
  return step.tokens.reduce((most, token) => Math.max(most, token.attention ?? 0), 0)
}

/** `63%`, `<1%`, `100%` only where it is. */
export function percent(value: number): string {
  if (value > 0 && value < 0.005) return '<1%'
  if (value < 1 && value > 0.994) return '>99%'
  return `${Math.round(100 * value)}%`
}
