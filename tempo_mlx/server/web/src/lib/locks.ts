/** What one tab is doing, for the others to see: a lock goes with the tab that holds it. Some browsers have none. */

export async function holding(name: string, job: () => Promise<void>): Promise<void> {
  let begun = false
  try {
    await navigator.locks.request(name, () => {
      begun = true
      return job()
    })
  } catch (error) {
    if (begun) throw error
    await job()
  }
}

export async function isHeld(name: string): Promise<boolean> {
  try {
    return (await navigator.locks.query()).held?.some((lock) => lock.name === name) ?? false
  } catch {
    return false
  }
}
