/** The colours of the lattice: the page's own custom properties, and the ramp between them. */

import { scaleLinear } from 'd3-scale'
import { interpolateLab } from 'd3-interpolate'

export interface Palette {
  ground: string
  ink: string
  muted: string
  faint: string
  line: string
  accent: string
  /** fill for a share from 0 to 1 */
  ramp: (share: number) => string
  /** text on that fill */
  inkOn: (share: number) => string
}

const STOPS = 64

export function paletteOf(element: Element): Palette {
  const style = getComputedStyle(element)
  const read = (name: string) => style.getPropertyValue(name).trim()
  const low = read('--ramp-low')
  const high = read('--ramp-high')
  const scale = scaleLinear<string>().domain([0, 1]).range([low, high]).interpolate(interpolateLab).clamp(true)
  const fills = Array.from({ length: STOPS + 1 }, (_, i) => scale(i / STOPS))
  const inks = ['#000000', '#ffffff']
  const texts = fills.map((fill) => (contrast(fill, inks[0]!) >= contrast(fill, inks[1]!) ? inks[0]! : inks[1]!))
  const at = (share: number) => Math.round(STOPS * Math.min(1, Math.max(0, share)))
  return {
    ground: read('--surface'),
    ink: read('--ink'),
    muted: read('--muted'),
    faint: read('--faint'),
    line: read('--line-strong'),
    accent: read('--accent'),
    ramp: (share) => fills[at(share)]!,
    inkOn: (share) => texts[at(share)]!,
  }
}

/** Contrast of two colours as WCAG defines it. */
export function contrast(a: string, b: string): number {
  const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x) as [number, number]
  return (light + 0.05) / (dark + 0.05)
}

function luminance(colour: string): number {
  const [r, g, b] = channels(colour).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!
}

/** `#rrggbb` or `rgb(r, g, b)` */
function channels(colour: string): number[] {
  if (colour.startsWith('#')) return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255)
  return (colour.match(/[\d.]+/g) ?? ['0', '0', '0']).slice(0, 3).map((c) => Number(c) / 255)
}
