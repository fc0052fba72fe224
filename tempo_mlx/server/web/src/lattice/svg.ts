/** A Painter that writes SVG. */

import { FONT, measurer, shorten } from './canvas'
import type { Lettering, Painter, Shape } from './paint'

export class SvgPainter implements Painter {
  private readonly parts: string[] = []
  private readonly measure = measurer()

  rect(x: number, y: number, width: number, height: number, style: Shape): void {
    const radius = style.radius ? ` rx="${style.radius}"` : ''
    this.parts.push(
      `<rect x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}"${radius}${attributes(style)}/>`,
    )
  }

  curve(x0: number, y0: number, x1: number, y1: number, style: Shape): void {
    const middle = n((x0 + x1) / 2)
    const path = `M${n(x0)} ${n(y0)}C${middle} ${n(y0)} ${middle} ${n(y1)} ${n(x1)} ${n(y1)}`
    this.parts.push(`<path d="${path}"${attributes(style)}/>`)
  }

  line(x0: number, y0: number, x1: number, y1: number, style: Shape): void {
    this.parts.push(`<path d="M${n(x0)} ${n(y0)}L${n(x1)} ${n(y1)}"${attributes(style)}/>`)
  }

  text(text: string, x: number, y: number, style: Lettering): void {
    if (text === '') return
    const shown = style.fit ? shorten(text, style.fit, this.measure) : text
    const anchor = style.align === 'right' ? ' text-anchor="end"' : ''
    const face = `${style.bold ? ' font-weight="600"' : ''}${style.italic ? ' font-style="italic"' : ''}`
    const opacity = style.opacity === undefined || style.opacity === 1 ? '' : ` opacity="${style.opacity}"`
    this.parts.push(
      `<text x="${n(x)}" y="${n(y)}" font-size="${style.size}" fill="${style.fill}"${anchor}${face}${opacity}>${escape(shown)}</text>`,
    )
  }

  finish(width: number, height: number, ground: string, title: string): string {
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${n(width)}" height="${n(height)}" ` +
      `viewBox="0 0 ${n(width)} ${n(height)}" font-family='${FONT}' xml:space="preserve"><title>${escape(title)}</title>` +
      `<rect width="100%" height="100%" fill="${ground}"/>${this.parts.join('\n')}</svg>\n`
    )
  }
}

function attributes({ fill, stroke, width, opacity, dash }: Shape): string {
  return (
    ` fill="${fill ?? 'none'}"` +
    (stroke ? ` stroke="${stroke}" stroke-width="${n(width ?? 1)}"` : '') +
    (opacity === undefined || opacity === 1 ? '' : ` opacity="${n(opacity)}"`) +
    (dash ? ` stroke-dasharray="${dash.join(' ')}"` : '')
  )
}

function n(value: number): string {
  return String(Math.round(value * 100) / 100)
}

function escape(text: string): string {
  return text
    .replace(/[\u0000-\u0008\u000B\u000C\u000E-\u001F\uFFFE\uFFFF]/g, '▯') // eslint-disable-line no-control-regex
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
}
