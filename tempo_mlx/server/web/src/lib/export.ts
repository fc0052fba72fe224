/** Files to take away. */

import type { Run } from './run'

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

/** Where the page built as one file holds its run; report/html.py writes the same. */
const EMBEDDED = /(<script type="application\/json" id="run">)[^<]*(<\/script>)/

/** The viewer as one file with `run` in it. `template` is standalone.html of the build. */
export function htmlOf(run: Run, template: string): Blob {
  const json = JSON.stringify(run).replaceAll('<', '\\u003c')
  if (!EMBEDDED.test(template)) throw new Error('The template has no place for a run.')
  return new Blob([template.replace(EMBEDDED, (_, open: string, close: string) => open + json + close)], {
    type: 'text/html',
  })
}
