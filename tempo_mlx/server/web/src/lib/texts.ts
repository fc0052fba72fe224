/** The texts of a run that holds several. */

import type { Path } from './run'

export interface Listed {
  path: Path
  /** which of the run's paths it is */
  index: number
}

/** Each text once, by its most probable path, as listed() in report/texts.py: tests/texts.json holds both to it. */
export function eachOnce(paths: readonly Path[]): Listed[] {
  const found = new Map<string, Listed>()
  for (const [index, path] of paths.entries()) {
    const seen = asSeen(path.text)
    const known = found.get(seen)
    if (!known || path.logprob > known.path.logprob) found.set(seen, { path, index })
  }
  return [...found.values()]
}

/** Without the blanks around a text and at the ends of its lines. */
function asSeen(text: string): string {
  return text.trim().replace(/[^\S\n]+(?=\n)/g, '')
}
