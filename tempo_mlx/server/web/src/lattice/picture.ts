/** The whole lattice as a picture. */

import { CanvasPainter } from './canvas'
import { paint, type Scene } from './paint'
import { SvgPainter } from './svg'

/** What browsers and viewers still open. */
const LONGEST_SIDE = 16384

export function svgOf(scene: Scene, title: string): Blob {
  const painter = new SvgPainter()
  paint(painter, scene, 1, 0, scene.lattice.length)
  const { width, height } = scene.layout.extent
  return new Blob([painter.finish(width, height, scene.palette.ground, title)], { type: 'image/svg+xml' })
}

/** Twice life size, or as large as a picture may be. */
export async function pngOf(scene: Scene): Promise<Blob> {
  const { width, height } = scene.layout.extent
  const zoom = Math.min(2, LONGEST_SIDE / width, LONGEST_SIDE / height)
  const canvas = document.createElement('canvas')
  canvas.width = Math.ceil(width * zoom)
  canvas.height = Math.ceil(height * zoom)
  const context = canvas.getContext('2d')!
  context.fillStyle = scene.palette.ground
  context.fillRect(0, 0, canvas.width, canvas.height)
  context.scale(zoom, zoom)
  paint(new CanvasPainter(context), scene, zoom, 0, scene.lattice.length)
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('The picture is too large.'))), 'image/png'),
  )
}
