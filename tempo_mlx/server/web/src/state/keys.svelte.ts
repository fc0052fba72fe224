/** Single-key commands can be switched off, for people whose speech or slips would trigger them. */

import { inBrowser } from '../lib/storage'

const KEY = 'tempo-mlx.single-keys'

class Keys {
  private on = $state(inBrowser.get(KEY) !== 'false')

  get single(): boolean {
    return this.on
  }

  set single(on: boolean) {
    this.on = on
    inBrowser.set(KEY, String(on))
  }
}

export const keys = new Keys()

/** Is the reader typing? */
export function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches('input:not([type=checkbox], [type=range]), textarea, select')
}
