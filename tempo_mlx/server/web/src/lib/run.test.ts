import { describe, expect, it } from 'vitest'
import { capital, large } from '../testing/runs'
import { diffText, diffValues } from './diff'
import { RunFileError } from './run'
import { parseShown } from './shown'

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

it('differences of texts are words, of settings their names', () => {
  expect(diffText('the old man', 'the young man').map((p) => p.text)).toEqual(['the ', 'old', 'young', ' man'])
  expect(diffValues({ a: 1, b: [1] }, { a: 2, b: [1], c: null }).map((d) => d.name)).toEqual(['a', 'c'])
})
