/** What is around a view: the page, which can go on with a run, or a page of somebody else's, which shows it only. */

import { getContext, setContext } from 'svelte'
import type { App } from './app.svelte'

export interface Around {
  /** null: the run is only looked at */
  readonly app: App | null
  readonly dark: boolean
}

const AROUND = Symbol('around')
export const provideAround = (around: Around): Around => setContext(AROUND, around)
export const useAround = (): Around => getContext(AROUND)
/** For what is on the page only. */
export const useApp = (): App => useAround().app!
