import { describe, expect, it } from 'vitest'
import { table } from '../testing/table'
import {
  changesIn,
  chooseRecipe,
  fill,
  parseSetting,
  readLink,
  recipeOf,
  recipes,
  unchanged,
  writeLink,
  writeSetting,
} from './settings'

const setting = (name: string) => table.settings.find((s) => s.name === name)!

describe('a field', () => {
  it.each([
    ['threshold', '0.25', 0.25],
    ['max_parallel_tokens', 'auto', 'auto'],
    ['max_parallel_tokens', '4', 4],
    ['chat', 'true', true],
    ['system', '', null],
    ['stop', 'a, b\nc', ['a, b', 'c']],
    ['exit_layers', '3, 7', [3, 7]],
    ['exit_layers', '', []],
  ])('%s reads %j', (name, text, value) => {
    expect(parseSetting(setting(name), text)).toEqual({ value })
  })

  it.each([
    ['threshold', '1.5'],
    ['threshold', ''],
    ['threshold', 'NaN'],
    ['max_tokens', '2.5'],
    ['max_tokens', '0'],
    ['min_p', '1'],
    ['min_p', '0'],
    ['attend', 'everyone'],
    ['exit_layers', '3, x'],
    ['chat', 'maybe'],
  ])('%s refuses %j', (name, text) => {
    expect(parseSetting(setting(name), text).error).toMatch(/^Choose/)
  })

  it('writes what it reads', () => {
    for (const [name, text] of [
      ['stop', 'a, b\nc'],
      ['exit_layers', '3, 7'],
      ['threshold', '0.3'],
    ] as const) {
      expect(writeSetting(setting(name), parseSetting(setting(name), text).value!)).toBe(text)
    }
  })
})

describe('a form', () => {
  it('sends what was chosen, applies and is not so anyway', () => {
    const { explicit } = fill(table, { threshold: '0.1', max_tokens: '20', posterior_threshold: '0.3' })
    expect(explicit).toEqual({ max_tokens: 20 })
  })

  it('takes the preset for granted and lets single settings override it', () => {
    const { values, explicit, applies } = fill(table, { preset: 'original', attend: 'weighted' })
    expect(values.combine).toBe('last')
    expect(explicit).toEqual({ preset: 'original', attend: 'weighted' })
    expect(applies.has('pruning_signal')).toBe(true)
    expect(applies.has('posterior_threshold')).toBe(false)
  })

  it('sends a default that the preset would change', () => {
    expect(fill(table, { preset: 'original', attend: 'lineage' }).explicit.attend).toBe('lineage')
  })

  it('has no error where a setting has no effect', () => {
    expect(fill(table, { threshold: 'x' }).errors).toHaveProperty('threshold')
    expect(fill(table, { threshold: 'x', decoder: 'plain' }).errors).toEqual({})
  })
})

describe('recipes', () => {
  it('are those the server can serve', () => {
    expect(recipes(table).map((r) => r.name)).toEqual(['lineage', 'original', 'plain', 'early-exit'])
  })

  it('are recognised and chosen', () => {
    expect(recipeOf(table, { max_tokens: '5' })?.name).toBe('lineage')
    expect(recipeOf(table, { preset: 'plain', temperature: '0' })?.name).toBe('plain')
    expect(recipeOf(table, { preset: 'plain', temperature: '0.7' })).toBeUndefined()
    expect(recipeOf(table, { early_exit: 'true', max_tokens: '5' })?.name).toBe('early-exit')
    const original = recipes(table)[1]!
    const chosen = chooseRecipe(table, { preset: 'plain', temperature: '0', max_tokens: '5', attend: 'best' }, original)
    expect(chosen).toEqual({ preset: 'original', max_tokens: '5' })
    expect(chooseRecipe(table, { early_exit: 'true', max_tokens: '5' }, recipes(table)[0]!)).toEqual({
      max_tokens: '5',
    })
  })

  it.each([
    [{ preset: 'plain', temperature: '0' }, [], { preset: 'plain', temperature: '0' }],
    [{ early_exit: 'true', max_tokens: '5', threshold: '2' }, ['max_tokens', 'threshold'], { early_exit: 'true' }],
    [{ preset: 'plain', temperature: '0.7' }, ['temperature'], { preset: 'plain' }],
  ])('%j changes %j', (chosen, changed, back) => {
    expect([...changesIn(table, chosen, fill(table, chosen))]).toEqual(changed)
    expect(unchanged(table, chosen)).toEqual(back)
  })
})

describe('a link', () => {
  it('comes back as it went, whatever the prompt holds', () => {
    const prompt = 'Tom & Jerry #1 = 100%\n\u{1F30D} "ok"?'
    const chosen = { preset: 'original', max_tokens: '20', stop: 'a & b\nc', max_parallel_tokens: 'auto' }
    const link = writeLink(table, prompt, chosen)
    expect(readLink(table, link)).toEqual({ prompt, chosen: { ...chosen, seed: '42' }, unknown: [] })
    expect(fill(table, readLink(table, link).chosen).explicit).toEqual(fill(table, chosen).explicit)
  })

  it('always names the seed, and reports what it does not know', () => {
    expect(writeLink(table, 'x', {})).toBe('#prompt=x&seed=42')
    expect(readLink(table, '#prompt=x&colour=red').unknown).toEqual(['colour'])
  })
})
