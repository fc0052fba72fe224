/** Runs kept in this browser, so that a reload or a closed tab loses none. */

import { openDB, type DBSchema } from 'idb'
import type { Answers } from './answers'
import type { Phrase, Run } from './run'

export interface Title {
  id: string
  name: string
  /** when it was last changed, in milliseconds */
  at: number
  /** how its text begins */
  text: string
  steps: number
}

export interface Kept {
  id: string
  run: Run
  phrases: Phrase[]
  /** of runs that were asked, and kept since there are answers */
  answers?: Answers | null
}

/** Titles stand apart, so that a list need not read whole runs. */
interface Schema extends DBSchema {
  titles: { key: string; value: Title }
  runs: { key: string; value: Kept }
}

const opened = () =>
  openDB<Schema>('tempo-mlx', 1, {
    upgrade(database) {
      database.createObjectStore('titles', { keyPath: 'id' })
      database.createObjectStore('runs', { keyPath: 'id' })
    },
  })

let connection: ReturnType<typeof opened> | null = null
const database = () => (connection ??= opened())

/** Newest first. */
export async function titles(): Promise<Title[]> {
  const all = await (await database()).getAll('titles')
  return all.sort((a, b) => b.at - a.at)
}

export async function keep(title: Title, kept: Kept): Promise<void> {
  const change = (await database()).transaction(['titles', 'runs'], 'readwrite')
  await Promise.all([change.objectStore('titles').put(title), change.objectStore('runs').put(kept), change.done])
}

export async function rename(title: Title, name: string): Promise<void> {
  await (await database()).put('titles', { ...title, name })
}

export async function take(id: string): Promise<Kept | undefined> {
  return (await database()).get('runs', id)
}

export async function drop(id: string): Promise<void> {
  const change = (await database()).transaction(['titles', 'runs'], 'readwrite')
  await Promise.all([change.objectStore('titles').delete(id), change.objectStore('runs').delete(id), change.done])
}
