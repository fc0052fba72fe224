/** Files to take away. */

import type { Run } from './run'
import type { Shown } from './shown'

export function download(blob: Blob, name: string): void {
  const link = document.createElement('a')
  link.href = URL.createObjectURL(blob)
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
}

export function fileName(run: Run, ending: string): string {
  const words = run.prompt.text.normalize('NFKD').match(/[A-Za-z0-9]+/g)
  const name = (words ?? ['run']).slice(0, 6).join('-').toLowerCase().slice(0, 48)
  return `${name}.${ending}`
}

export function jsonOf(run: Run): Blob {
  return new Blob([JSON.stringify(run)], { type: 'application/json' })
}

/** Where the page with the viewer holds what it shows; report/html.py writes the same. */
const PLACE = '<script type="application/json"></script>'

/** The viewer as one file with a run in it: standalone.html of the build. */
export async function htmlOf(shown: Shown): Promise<Blob> {
  const [before, after] = (await (await fetch('standalone.html')).text()).split(PLACE)
  const json = JSON.stringify(shown).replaceAll('<', '\\u003c') // the same JSON: "<" occurs in strings only
  return new Blob([before!, PLACE.replace('></', () => `>${json}</`), after!], { type: 'text/html' })
}
