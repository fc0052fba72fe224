/** Files to take away. */

import { gone } from './api'
import type { Run } from './run'
import { fileOf, type Shown } from './shown'

export function download(blob: Blob, name: string): void {
  const link = document.createElement('a')
  link.href = URL.createObjectURL(blob)
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
}

/** Onto the clipboard; false where the browser does not allow it. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    // A page that came over plain HTTP from another machine has no such clipboard, but may copy what is selected.
    const [field, focused] = [document.createElement('textarea'), document.activeElement]
    field.value = text
    field.style.position = 'fixed'
    document.body.append(field)
    field.select()
    const copied = document.execCommand('copy')
    field.remove()
    if (focused instanceof HTMLElement) focused.focus()
    return copied
  }
}

export function fileName(run: Run, ending: string): string {
  const words = run.prompt.text.normalize('NFKD').match(/[A-Za-z0-9]+/g)
  const name = (words ?? ['run']).slice(0, 6).join('-').toLowerCase().slice(0, 48)
  return `${name}.${ending}`
}

/** The run file, or of answers without a run, those. */
export function jsonOf(shown: Shown): Blob {
  return new Blob([JSON.stringify(shown.run ?? fileOf(shown))], { type: 'application/json' })
}

/** Where the page with the viewer holds what it shows; report/html.py writes the same. */
const PLACE = '<script type="application/json"></script>'

/** The viewer as one file with a run in it: standalone.html of the build. */
export async function htmlOf(shown: Shown): Promise<Blob> {
  const response = await fetch('standalone.html').catch(() => null)
  if (!response?.ok) throw gone()
  const [before, after] = (await response.text()).split(PLACE)
  const json = JSON.stringify(fileOf(shown)).replaceAll('<', '\\u003c') // the same JSON: "<" occurs in strings only
  return new Blob([before!, PLACE.replace('></', () => `>${json}</`), after!], { type: 'text/html' })
}
