import { expect, it } from 'vitest'
import { turn } from '../testing/turns'
import type { Phrase } from './run'
import { after, messagesTo, nextReading, pathOf, showing, under, type Talk, type Turn } from './talk'

const talk = (shown: Talk['shown'] = {}): Talk => ({
  id: 't',
  name: '',
  at: 0,
  system: '',
  chosen: {},
  model: 'm',
  shown,
})
/** A question with two answers, of which the first was asked on from, twice. */
const TREE = [
  turn('q1', null),
  turn('a1', 'q1'),
  turn('q2', 'a1'),
  turn('a2', 'q2'),
  turn('q2b', 'a1'),
  turn('a1b', 'q1'),
]
const ids = (turns: Turn[]) => turns.map(({ id }) => id)

it('the newest of what was said in one place is shown, unless another was looked at', () => {
  expect(ids(pathOf(talk(), TREE))).toEqual(['q1', 'a1b'])
  expect(ids(pathOf(talk({ q1: 'a1' }), TREE))).toEqual(['q1', 'a1', 'q2b'])
  expect(ids(pathOf(talk({ q1: 'a1', a1: 'q2' }), TREE))).toEqual(['q1', 'a1', 'q2', 'a2'])
  expect(ids(pathOf(talk({ q1: 'deleted' }), TREE))).toEqual(['q1', 'a1b'])
  expect(pathOf(talk(), [])).toEqual([])
})

it('turns in one place stand in the order in which they were said, whatever the order they are kept in', () => {
  expect(ids(after([...TREE].reverse(), 'a1'))).toEqual(['q2', 'q2b'])
})

it('to show a turn is to show all that leads to it, and to leave the rest as it was looked at', () => {
  const shown = showing(talk({ q1: 'a1b', a1: 'q2b', other: 'x' }), TREE, TREE[3]!)
  expect(shown).toEqual({ '': 'q1', q1: 'a1', a1: 'q2', q2: 'a2', other: 'x' })
})

it('a deleted turn takes what was said after it along', () => {
  expect(ids(under(TREE, TREE[1]!)).sort()).toEqual(['a1', 'a2', 'q2', 'q2b'])
})

it('the model is told the system prompt and what leads to a turn, and nothing of what was said beside it', () => {
  expect(messagesTo('Be brief.', TREE, TREE[2]!)).toEqual([
    { role: 'system', content: 'Be brief.' },
    { role: 'user', content: 'q1' },
    { role: 'assistant', content: 'a1' },
    { role: 'user', content: 'q2' },
  ])
  expect(messagesTo(' ', TREE, TREE[0]!)).toEqual([{ role: 'user', content: 'q1' }])
})

const other = (text: string, share: number, slots: (number | null)[] = [1]) => ({ text, share, slots, follows: '' })
const phrase = (text: string, share: number | null, ...alternatives: Phrase['alternatives']): Phrase => ({
  text,
  share,
  alternatives,
  start: 0,
  end: 1,
})

it('another answer is the next most probable reading that is not there yet', () => {
  const phrases = [
    phrase('A', null),
    phrase(' cat', 0.5, other(' dog', 0.3), other(' cow', 0.2)),
    phrase(' sat', 0.4, other(' ran', 0.35), other('', 0.25, [null])),
  ]
  const order: string[] = []
  const texts = ['A cat sat']
  for (let next = nextReading(phrases, texts); next; next = nextReading(phrases, texts)) {
    order.push(next.other.text)
    texts.push((next.phrase === phrases[1] ? 'A' : 'A cat') + next.other.text)
  }
  // .3 and .2, as few as readings that begin like that are; .5 x .35 after "A cat"; a text that ends is none to go on with
  expect(order).toEqual([' dog', ' cow', ' ran'])
  expect(nextReading([phrase('Sure.', null)], [])).toBeNull()
})
