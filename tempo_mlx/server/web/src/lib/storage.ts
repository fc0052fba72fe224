/** What a browser keeps of the page: for the tab, or for good. Where it may keep nothing, for as long as the page is open. */

function kept(area: () => Storage) {
  const own = new Map<string, string>()
  return {
    get(key: string): string | null {
      try {
        return area().getItem(key) ?? own.get(key) ?? null
      } catch {
        return own.get(key) ?? null
      }
    },
    set(key: string, value: string): void {
      own.set(key, value)
      try {
        area().setItem(key, value)
      } catch {
        // it is forbidden, or full
      }
    },
    remove(key: string): void {
      own.delete(key)
      try {
        area().removeItem(key)
      } catch {
        // as above
      }
    },
  }
}

export const inTab = kept(() => sessionStorage)
export const inBrowser = kept(() => localStorage)
