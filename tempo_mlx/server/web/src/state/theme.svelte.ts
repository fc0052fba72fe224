/** Light or dark: what the system says, until the reader chooses. Sets `data-theme`, which the styles follow. */

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
    try {
      localStorage.setItem(KEY, this.chosen)
    } catch {
      // a page opened from disk may not store anything
    }
    this.apply()
  }

  private apply(): void {
    document.documentElement.dataset.theme = this.current
  }
}

function read(): 'light' | 'dark' | null {
  try {
    const stored = localStorage.getItem(KEY)
    return stored === 'light' || stored === 'dark' ? stored : null
  } catch {
    return null
  }
}

export const theme = new Theme()
