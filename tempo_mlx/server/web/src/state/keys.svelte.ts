/** Single-key commands can be switched off, for people whose speech or slips would trigger them. */

const KEY = 'tempo-mlx.single-keys'

class Keys {
  private on = $state(read())

  get single(): boolean {
    return this.on
  }

  set single(on: boolean) {
    this.on = on
    try {
      localStorage.setItem(KEY, String(on))
    } catch {
      // a page opened from disk may not store anything
    }
  }
}

function read(): boolean {
  try {
    return localStorage.getItem(KEY) !== 'false'
  } catch {
    return true
  }
}

export const keys = new Keys()

/** Is the reader typing? */
export function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches('input:not([type=checkbox], [type=range]), textarea, select')
}
