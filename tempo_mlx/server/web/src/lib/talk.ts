/** A conversation as a tree: what was said, and what was said instead. */

import type { Alternative, Phrase } from './run'
import type { Chosen } from './settings'

/** One question, or one answer to it. Turns with the same parent stand in each other's place. */
export interface Turn {
  id: string
  talk: string
  /** what it was said after; null: it begins the conversation */
  parent: string | null
  role: 'user' | 'assistant'
  text: string
  /** when it was begun, in milliseconds */
  at: number
  answer: Answered | null
}

/** What is known of an answer beside its text. */
export interface Answered {
  /** under which its run is kept; the branches of one run share it */
  run: string
  /** `growing`: not whole, and nobody has stopped it */
  state: 'growing' | 'whole' | 'length' | 'stopped'
  /** the session that it grows in */
  session: string | null
  /** settings, system prompt and model that it was asked for with */
  asked: string
  /** what was said in place of other words, to get here */
  taken: string | null
}

export interface Talk {
  id: string
  name: string
  /** when something was last said */
  at: number
  system: string
  chosen: Chosen
  /** that was asked last */
  model: string
  /** of each turn, which of those after it was looked at last; `''` stands for the beginning */
  shown: Record<string, string>
}

export interface Message {
  role: 'system' | 'user' | 'assistant'
  content: string
}

/** What was said right after `parent`, oldest first. */
export function after(turns: readonly Turn[], parent: string | null): Turn[] {
  return turns.filter((turn) => turn.parent === parent).sort((a, b) => a.at - b.at)
}

/** From the beginning to where the conversation is. */
export function pathOf({ shown }: Pick<Talk, 'shown'>, turns: readonly Turn[]): Turn[] {
  const path: Turn[] = []
  for (let parent: string | null = null; ;) {
    const all: Turn[] = after(turns, parent)
    const next: Turn | undefined = all.find(({ id }) => id === shown[parent ?? '']) ?? all.at(-1)
    if (!next || path.includes(next)) return path
    path.push(next)
    parent = next.id
  }
}

/** The turns that lead to one, and that one. */
export function leadingTo(turns: readonly Turn[], turn: Turn): Turn[] {
  const before = turns.find(({ id }) => id === turn.parent)
  return before ? [...leadingTo(turns, before), turn] : [turn]
}

/** What is shown, so that this turn is. */
export function showing(talk: Talk, turns: readonly Turn[], turn: Turn): Talk['shown'] {
  const chosen = leadingTo(turns, turn).map(({ parent, id }) => [parent ?? '', id])
  return { ...talk.shown, ...(Object.fromEntries(chosen) as Talk['shown']) }
}

/** A turn and all that was said after it. */
export function under(turns: readonly Turn[], turn: Turn): Turn[] {
  return [turn, ...after(turns, turn.id).flatMap((next) => under(turns, next))]
}

/** What the model is told, up to and with a turn. */
export function messagesTo(system: string, turns: readonly Turn[], turn: Turn): Message[] {
  const said = leadingTo(turns, turn).map(({ role, text }) => ({ role, content: text }))
  return system.trim() ? [{ role: 'system', content: system }, ...said] : said
}

/**
 * The most probable reading of an answer that none of `texts` begins with: where it parts from the answer, and what it
 * says there. Null where they are all there.
 */
export function nextReading(
  phrases: readonly Phrase[],
  texts: readonly string[],
): { phrase: Phrase; other: Alternative } | null {
  let [before, held, most] = ['', 1, 0]
  let best: { phrase: Phrase; other: Alternative } | null = null
  for (const phrase of phrases) {
    for (const other of phrase.alternatives) {
      const known = texts.some((text) => text.startsWith(before + other.text))
      if (known || other.slots.every((slot) => slot === null) || held * other.share <= most) continue
      best = { phrase, other }
      most = held * other.share
    }
    before += phrase.text
    if (phrase.alternatives.length > 0) held *= phrase.share ?? 1
  }
  return best
}
