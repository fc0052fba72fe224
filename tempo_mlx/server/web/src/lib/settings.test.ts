import { describe, expect, it } from 'vitest'
import { forms, old, table } from '../testing/table'
import {
  changesIn,
  choicesOf,
  chooseRecipe,
  fill,
  parseSetting,
  readLink,
  recipeOf,
  recipes,
  unchanged,
  usualText,
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
    ['exit_target_agreement', '1'],
    ['top_p', '0'],
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

describe('a server that was started with other defaults', () => {
  const here = { ...table, defaults: { threshold: 0.3, max_tokens: 30 } }

  it('has them in its form, and is told what differs from them', () => {
    expect(fill(here, {}).values).toMatchObject({ threshold: 0.3, max_tokens: 30 })
    expect(fill(here, { threshold: '0.1', max_tokens: '30' }).explicit).toEqual({ threshold: 0.1 })
    expect(fill(here, { preset: 'original' }).values).toMatchObject({ threshold: 0.3, attend: 'all' })
    expect(choicesOf(here, { threshold: 0.1, max_tokens: 30 })).toEqual({ threshold: '0.1' })
    expect(usualText(here, setting('threshold'), {})).toBe('0.3')
    expect(usualText(here, setting('attend'), { preset: 'original' })).toBe('all')
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

describe('the form and resolve()', () => {
  const changed = (chosen: Record<string, string>) => {
    const { values } = fill(table, chosen)
    const usual = Object.fromEntries(table.settings.map((s) => [s.name, s.default]))
    return Object.fromEntries(Object.entries(values).filter(([k, v]) => JSON.stringify(v) !== JSON.stringify(usual[k])))
  }

  it.each(forms)('agree on what follows from $chosen', (form) => {
    expect(changed(form.chosen)).toEqual(form.changed)
    const { applies, errors } = fill(table, form.chosen)
    expect(errors).toEqual({})
    for (const name of Object.keys(form.chosen)) if (name !== 'preset') expect(applies).toContain(name)
  })

  it.each(old)('agree on what settings of version 0.1.0 mean', ({ config, changed: expected }) => {
    expect(changed(choicesOf(table, config))).toEqual(expected)
  })

  it('show a switch that brings what it needs, unless that was chosen otherwise', () => {
    expect(fill(table, {}).applies).toContain('enable_thinking')
    expect(fill(table, {}).applies).not.toContain('thinking_budget')
    expect(fill(table, { chat: 'false', enable_thinking: 'true' }).applies).not.toContain('enable_thinking')
  })
})

describe('recipes', () => {
  it('are those the server can serve', () => {
    const names = ['lineage', 'original', 'branches', 'plain', 'early-exit', 'answers']
    expect(recipes(table).map((r) => r.name)).toEqual(names)
    const { branches: _, ...presets } = table.presets
    expect(recipes({ ...table, presets }).map((r) => r.name)).toEqual(names.filter((name) => name !== 'branches'))
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

  it('ask as the server does, and may be asked otherwise', () => {
    const answers = recipes(table).at(-1)!
    const asked = chooseRecipe(table, { max_tokens: '5', seed: '1' }, answers)
    const { decoder, threshold, leaves } = table.ask
    expect(fill(table, asked).values).toMatchObject({ decoder, threshold, leaves, seed: 1 })
    expect([...changesIn(table, asked, fill(table, asked))]).toEqual(['seed'])
    const fewer = { ...asked, leaves: '4', by: 'regex', answer_regex: '\\d+' }
    expect(recipeOf(table, fewer)?.name).toBe('answers')
    expect([...changesIn(table, fewer, fill(table, fewer))]).toEqual(['seed', 'leaves'])
    expect(readLink(table, writeLink(table, 'x', fewer))).toEqual({ prompt: 'x', chosen: fewer, unknown: [] })
    expect(chooseRecipe(table, { decoder: 'enumerate', leaves: '4', seed: '1' }, recipes(table)[0]!)).toEqual({
      seed: '1',
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

  it('of version 0.1.0 means what it meant', () => {
    const { chosen, unknown } = readLink(table, '#pruning_signal=random&use_retroactive_pruning=true&use_relu=false')
    expect([chosen, unknown]).toEqual([{ pruning_signal: 'random', relu_activation_point: '' }, []])
  })
})
