/** Zoom and pan: screen = world * k + offset, never so small that nothing can be read: then there is the folded lattice. */

export interface Viewport {
  k: number
  x: number
  y: number
}

export interface Size {
  width: number
  height: number
}

export const MAX_ZOOM = 3
export const LEAST_ZOOM = 0.5

/** The zoom at which everything fits, as far as it can be read, and never larger than life. */
export function fitZoom(content: Size, view: Size): number {
  return Math.max(LEAST_ZOOM, Math.min(1, view.width / content.width, view.height / content.height))
}

export function fit(content: Size, view: Size): Viewport {
  const k = fitZoom(content, view)
  return { k, x: Math.max(0, (view.width - content.width * k) / 2), y: 0 }
}

/** Keep some of the content in sight: no further than its edges, and at the left and top while it is smaller. */
export function clamp(viewport: Viewport, content: Size, view: Size): Viewport {
  const k = Math.min(MAX_ZOOM, Math.max(fitZoom(content, view), viewport.k))
  const x = Math.max(Math.min(0, view.width - content.width * k), Math.min(0, viewport.x))
  const y = Math.max(Math.min(0, view.height - content.height * k), Math.min(0, viewport.y))
  return { k, x, y }
}

/** Zoom by `factor`; what is at the point (x, y) of the screen stays there. */
export function zoomAt(viewport: Viewport, factor: number, x: number, y: number, smallest: number): Viewport {
  const k = Math.min(MAX_ZOOM, Math.max(smallest, viewport.k * factor))
  const ratio = k / viewport.k
  return { k, x: x - (x - viewport.x) * ratio, y: y - (y - viewport.y) * ratio }
}

/** Move just so far that this part of the world is in sight, with some of what is beside it. */
export function reveal({ k, x, y }: Viewport, part: Size & { x: number; y: number }, view: Size): Viewport {
  return {
    k,
    x: moved(x, part.x * k, part.width * k, view.width, 48),
    y: moved(y, part.y * k, part.height * k, view.height, 8),
  }
}

function moved(offset: number, start: number, length: number, room: number, margin: number): number {
  const [from, to] = [start + offset, start + length + offset]
  if (from < margin) return offset + margin - from
  return to > room - margin ? offset + room - margin - to : offset
}
