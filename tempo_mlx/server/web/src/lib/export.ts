/** Files to take away. */

import type { Phrase, Run } from './run'

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

/** Where the page built as one file holds its run and its phrases; report/html.py writes the same. */
const place = (id: string) => new RegExp(`(<script type="application/json" id="${id}">)[^<]*(</script>)`)

/** The viewer as one file with `run` in it. `template` is standalone.html of the build, empty or with another run. */
export function htmlOf(run: Run, phrases: Phrase[], template: string): Blob {
  let page = template
  for (const [id, value] of Object.entries({ run, phrases })) {
    if (!place(id).test(page)) throw new Error('The template has no place for a run.')
    const json = JSON.stringify(value).replaceAll('<', '\\u003c')
    page = page.replace(place(id), (_, open: string, close: string) => open + json + close)
  }
  return new Blob([page], { type: 'text/html' })
}
