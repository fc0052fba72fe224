import { describe, expect, it } from 'vitest'
import { capital, large } from '../testing/runs'
import { diffText, diffValues } from './diff'
import { RunFileError } from './run'
import { checkShown, fileOf, parseShown } from './shown'

describe('a run file', () => {
  it('is read', () => {
    expect(parseShown(JSON.stringify(capital())).run).toEqual(capital())
    expect(parseShown(JSON.stringify(large(20, 4))).run!.steps).toHaveLength(20)
  })

  it.each([
    ['not JSON', '{'],
    ['another format', '{"format": "x"}'],
    ['a later version', JSON.stringify({ ...capital(), version: 2 })],
    ['no steps', JSON.stringify({ ...capital(), steps: null })],
    ['a step out of order', JSON.stringify({ ...capital(), steps: capital().steps.slice(1) })],
    ['a token without a probability', JSON.stringify(capital()).replace('"probability":0.6', '"probability":null')],
    ['a broken edge', JSON.stringify(capital()).replace('[6,0.98,0.65]', '[6,0.98]')],
  ])('is refused with a sentence: %s', (_, text) => {
    expect(() => parseShown(text)).toThrow(RunFileError)
    expect(() => parseShown(text)).toThrow(/\.$/)
  })
})

describe('what can be shown', () => {
  const answers = {
    question: 'Who?',
    answers: [{ text: 'I', lower: 0.5, upper: 0.6, estimate: null, texts: [] }],
    not_looked_at: 0.1,
  }

  it('is a run, a run with its phrases, or answers with a run or without', () => {
    const phrases = [{ text: ' Paris', share: null, alternatives: [], start: 0, end: 1 }]
    expect(checkShown(capital())).toEqual({ run: capital(), phrases: [], answers: null })
    expect(checkShown({ run: capital(), phrases })).toEqual({ run: capital(), phrases, answers: null })
    expect(checkShown({ ...answers, run: null })).toMatchObject({ run: null, answers })
    expect(checkShown({ ...answers, run: capital() }).run).toEqual(capital())
  })

  it('is read again from the file that it was taken away as', () => {
    const phrases = [{ text: ' Paris', share: null, alternatives: [], start: 0, end: 1 }]
    for (const shown of [
      { run: capital(), phrases, answers: null },
      { run: null, phrases: [], answers: { ...answers, decided: true } },
      { run: capital(), phrases: [], answers: { ...answers, decided: true } },
    ]) {
      expect(parseShown(JSON.stringify(fileOf(shown)))).toMatchObject(shown)
    }
  })

  it.each([
    ['nothing', null],
    ['a damaged run', { run: { ...capital(), steps: null }, phrases: [] }],
    ['damaged phrases', { run: capital(), phrases: [{ text: 1 }] }],
    ['answers without bounds', { ...answers, answers: [{ text: 'I', texts: [] }] }],
    ['answers of another kind', { answers: {} }],
  ])('is refused with a sentence: %s', (_, value) => {
    expect(() => checkShown(value)).toThrow(/\.$/)
  })
})

it('differences of texts are words, of settings their names', () => {
  expect(diffText('the old man', 'the young man').map((p) => p.text)).toEqual(['the ', 'old', 'young', ' man'])
  expect(diffValues({ a: 1, b: [1] }, { a: 2, b: [1], c: null }).map((d) => d.name)).toEqual(['a', 'c'])
})
