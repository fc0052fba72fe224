/** Light or dark: what the system says, until the reader chooses. Sets `data-theme`, which the styles follow. */

import { inBrowser } from '../lib/storage'

const KEY = 'tempo-mlx.theme'
const dark = matchMedia('(prefers-color-scheme: dark)')

class Theme {
  /** null: as the system */
  private chosen: 'light' | 'dark' | null = $state(read())
  private system: 'light' | 'dark' = $state(dark.matches ? 'dark' : 'light')
  readonly current = $derived(this.chosen ?? this.system)

  constructor() {
    dark.addEventListener('change', () => {
      this.system = dark.matches ? 'dark' : 'light'
      this.apply()
    })
    this.apply()
  }

  toggle(): void {
    this.chosen = this.current === 'dark' ? 'light' : 'dark'
    inBrowser.set(KEY, this.chosen)
    this.apply()
  }

  private apply(): void {
    document.documentElement.dataset.theme = this.current
  }
}

function read(): 'light' | 'dark' | null {
  const stored = inBrowser.get(KEY)
  return stored === 'light' || stored === 'dark' ? stored : null
}

export const theme = new Theme()
