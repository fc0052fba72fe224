import type { Attributes } from './Viewer.svelte'

/** Stands for the style sheet, which the build puts here. */
export const STYLES = '@styles'

/** What an element shows; the view follows it. */
export function attributes(): Attributes {
  const values: Attributes = $state({ shown: null, problem: '', theme: null, page: false })
  return values
}
