/** Runs and conversations kept in this browser, so that a reload or a closed tab loses none. */

import { openDB, type DBSchema } from 'idb'
import type { Answers } from './answers'
import type { Phrase, Run } from './run'
import type { Talk, Turn } from './talk'

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

/**
 * Titles stand apart, so that a list need not read whole runs; runs without one are of answers. Turns are kept each by
 * itself, so that two tabs with one conversation take nothing from each other.
 */
interface Schema extends DBSchema {
  titles: { key: string; value: Title }
  runs: { key: string; value: Kept }
  talks: { key: string; value: Talk }
  turns: { key: string; value: Turn; indexes: { talk: string } }
}

const opened = () =>
  openDB<Schema>('tempo-mlx', 2, {
    upgrade(database, from) {
      if (from < 1) {
        database.createObjectStore('titles', { keyPath: 'id' })
        database.createObjectStore('runs', { keyPath: 'id' })
      }
      database.createObjectStore('talks', { keyPath: 'id' })
      database.createObjectStore('turns', { keyPath: 'id' }).createIndex('talk', 'talk')
    },
    blocking: (_, __, { target }) => (target as IDBDatabase).close(), // a tab of a newer version waits for this one
    terminated: () => forget(), // the browser's data was cleared
  })

let connection: ReturnType<typeof opened> | null = null
const forget = () => (connection = null)
const database = () => {
  connection ??= opened()
  connection.catch(forget) // the next time it may be possible
  return connection
}

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

/** Newest first. */
export async function talks(): Promise<Talk[]> {
  const all = await (await database()).getAll('talks')
  return all.sort((a, b) => b.at - a.at)
}

/** Of one conversation, or of all. */
export async function turnsOf(talk?: string): Promise<Turn[]> {
  const open = await database()
  return talk === undefined ? open.getAll('turns') : open.getAllFromIndex('turns', 'talk', talk)
}

export async function keepTalk(talk: Talk): Promise<void> {
  await (await database()).put('talks', talk)
}

/** A turn, and, of an answer, the run that it is. */
export async function keepTurn(turn: Turn, run: Kept | null = null): Promise<void> {
  const change = (await database()).transaction(['turns', 'runs'], 'readwrite')
  const writing: Promise<unknown>[] = [change.objectStore('turns').put(turn)]
  if (run) writing.push(change.objectStore('runs').put(run))
  await Promise.all([...writing, change.done])
}

/** Forget these turns and their runs, except for what the turns that stay share with them. */
export async function dropTurns(turns: readonly Turn[], staying: readonly Turn[] = []): Promise<void> {
  const change = (await database()).transaction(['turns', 'runs'], 'readwrite')
  const shared = new Set(staying.map(({ answer }) => answer?.run))
  const runs = turns.flatMap(({ answer }) => (answer && !shared.has(answer.run) ? [answer.run] : []))
  const gone = turns.map(({ id }) => change.objectStore('turns').delete(id))
  await Promise.all([...gone, ...runs.map((run) => change.objectStore('runs').delete(run)), change.done])
}

export async function dropTalk(id: string): Promise<void> {
  await dropTurns(await turnsOf(id))
  await (await database()).delete('talks', id)
}
