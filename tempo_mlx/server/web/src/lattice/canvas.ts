/** A Painter on a canvas. */

import type { Lettering, Painter, Shape } from './paint'

export const FONT = '-apple-system, BlinkMacSystemFont, "Segoe UI", "Inter", "Noto Sans", "Liberation Sans", sans-serif'

export class CanvasPainter implements Painter {
  private font = ''
  private readonly shortened = new Map<string, string>()

  constructor(private readonly context: CanvasRenderingContext2D) {}

  rect(x: number, y: number, width: number, height: number, style: Shape): void {
    const { context } = this
    context.globalAlpha = style.opacity ?? 1
    context.beginPath()
    if (style.radius) context.roundRect(x, y, width, height, style.radius)
    else context.rect(x, y, width, height)
    this.finish(style)
  }

  curve(x0: number, y0: number, x1: number, y1: number, style: Shape): void {
    const { context } = this
    const middle = (x0 + x1) / 2
    context.globalAlpha = style.opacity ?? 1
    context.beginPath()
    context.moveTo(x0, y0)
    context.bezierCurveTo(middle, y0, middle, y1, x1, y1)
    this.finish(style)
  }

  line(x0: number, y0: number, x1: number, y1: number, style: Shape): void {
    const { context } = this
    context.globalAlpha = style.opacity ?? 1
    context.beginPath()
    context.moveTo(x0, y0)
    context.lineTo(x1, y1)
    this.finish(style)
  }

  text(text: string, x: number, y: number, style: Lettering): void {
    const { context } = this
    const font = fontOf(style)
    if (font !== this.font) context.font = this.font = font
    context.globalAlpha = style.opacity ?? 1
    context.fillStyle = style.fill
    context.textAlign = style.align ?? 'left'
    context.fillText(style.fit ? this.fit(text, style.fit) : text, x, y)
  }

  private finish(style: Shape): void {
    const { context } = this
    if (style.fill) {
      context.fillStyle = style.fill
      context.fill()
    }
    if (style.stroke) {
      context.strokeStyle = style.stroke
      context.lineWidth = style.width ?? 1
      if (style.dash) context.setLineDash(style.dash as number[])
      context.stroke()
      if (style.dash) context.setLineDash([])
    }
  }

  private fit(text: string, width: number): string {
    const key = `${this.font}|${width}|${text}`
    let result = this.shortened.get(key)
    if (result === undefined) {
      result = shorten(text, width, (part) => this.context.measureText(part).width)
      this.shortened.set(key, result)
    }
    return result
  }
}

export function shorten(text: string, width: number, measure: (text: string) => number): string {
  if (measure(text) <= width) return text
  const characters = [...text]
  const cut = (length: number) => `${characters.slice(0, length).join('')}…`
  let [fits, toolong] = [1, characters.length]
  while (toolong - fits > 1) {
    const middle = (fits + toolong) >> 1
    if (measure(cut(middle)) <= width) fits = middle
    else toolong = middle
  }
  return cut(fits)
}

export function fontOf({ size, bold, italic }: Lettering): string {
  return `${italic ? 'italic ' : ''}${bold ? '600 ' : ''}${size}px ${FONT}`
}

/** Widths of labels, measured once each. */
export function measurer(): (text: string) => number {
  const context = document.createElement('canvas').getContext('2d')!
  context.font = fontOf({ size: 12.5, bold: true, fill: '' })
  const known = new Map<string, number>()
  return (text) => {
    let width = known.get(text)
    if (width === undefined) known.set(text, (width = context.measureText(text).width))
    return width
  }
}
