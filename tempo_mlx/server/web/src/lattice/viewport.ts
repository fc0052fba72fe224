/**
 * Zoom and pan: screen x = world x * k + x, screen y = world y * vertical(k) + y. Far out only the columns go on
 * shrinking, so that a long run becomes a band of colours and not a line.
 */

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
const LEAST_VERTICAL = 0.5

export function vertical(k: number): number {
  return Math.max(k, LEAST_VERTICAL)
}

/** The zoom at which everything fits, never larger than life. */
export function fitZoom(content: Size, view: Size): number {
  const k = Math.min(1, view.width / content.width)
  return content.height * vertical(k) > view.height
    ? Math.min(k, Math.max(LEAST_VERTICAL, view.height / content.height))
    : k
}

export function fit(content: Size, view: Size): Viewport {
  const k = fitZoom(content, view)
  return { k, x: Math.max(0, (view.width - content.width * k) / 2), y: 0 }
}

/** Keep some of the content in sight: no further than its edges, and at the left and top while it is smaller. */
export function clamp(viewport: Viewport, content: Size, view: Size): Viewport {
  const k = Math.min(MAX_ZOOM, Math.max(fitZoom(content, view), viewport.k))
  const x = Math.max(Math.min(0, view.width - content.width * k), Math.min(0, viewport.x))
  const y = Math.max(Math.min(0, view.height - content.height * vertical(k)), Math.min(0, viewport.y))
  return { k, x, y }
}

/** Zoom by `factor`; what is at the point (x, y) of the screen stays there. */
export function zoomAt(viewport: Viewport, factor: number, x: number, y: number, smallest: number): Viewport {
  const k = Math.min(MAX_ZOOM, Math.max(smallest, viewport.k * factor))
  const tall = vertical(k) / vertical(viewport.k)
  return { k, x: x - (x - viewport.x) * (k / viewport.k), y: y - (y - viewport.y) * tall }
}

/** Move just so far that the world interval is in sight. */
export function reveal(viewport: Viewport, left: number, right: number, view: Size, margin = 24): Viewport {
  const from = left * viewport.k + viewport.x
  const to = right * viewport.k + viewport.x
  if (from < margin) return { ...viewport, x: viewport.x + margin - from }
  if (to > view.width - margin) return { ...viewport, x: viewport.x + view.width - margin - to }
  return viewport
}
