/** The settings form: what the server's table says, what the reader chose, and what a link holds. */

import type { Value, Values } from './run'

/** One line of the settings table, as `GET /settings` sends it. */
export interface Setting {
  name: string
  group: string
  audience: 'everyday' | 'study' | 'ablation'
  help: string
  type: 'boolean' | 'integer' | 'number' | 'string'
  many: boolean
  optional: boolean
  default: Value
  default_text: string
  minimum: number | null
  maximum: number | null
  above: number | null
  below: number | null
  choices: string[]
  values_text: string
  decoders: string[] | null
  /** other settings, and the values under which this one counts; no values: any but the default */
  needs: Record<string, Value[]> | null
  /** which of them get the first such value where this one is given and they are not */
  implies: string[]
}

export interface SettingsTable {
  model: string
  context_length: number | null
  /** does the model have a chat template; null while it is being loaded */
  chat: boolean | null
  /** length of a conversation's answers, unless another is chosen */
  answer_tokens: number
  /** the value of each setting where nothing is chosen, by what the server was started with */
  defaults?: Values
  presets: Record<string, Values>
  /** what a question is asked with, unless it is given */
  ask: Values
  /** further spellings, which run files of version 0.1.0 hold: what each sets when it is on, and off */
  shortcuts: Record<string, { setting: string; on: Value; off: Value; exactly: boolean }>
  decoders: string[]
  session_decoders: string[]
  groups: string[]
  settings: Setting[]
}

/** What the reader chose, by name: only what was set, as typed by hand. */
export type Chosen = Record<string, string>

export type Parsed = { value: Value; error?: undefined } | { value?: undefined; error: string }

/** The value that `text` writes, checked against the table. */
export function parseSetting(setting: Setting, text: string): Parsed {
  if (setting.type === 'boolean') {
    if (text === 'true' || text === 'false') return { value: text === 'true' }
    return wrong(setting)
  }
  if (text.trim() === '' && (setting.optional || setting.many)) return { value: setting.many ? [] : null }
  if (!setting.many) return parseOne(setting, text)
  const parts = setting.type === 'string' ? text.split('\n') : text.split(',')
  const values: Value[] = []
  for (const part of parts.filter((p) => p.trim() !== '')) {
    const parsed = parseOne(setting, part)
    if (parsed.error !== undefined) return parsed
    values.push(parsed.value)
  }
  return { value: values }
}

function parseOne(setting: Setting, text: string): Parsed {
  if (setting.choices.includes(text)) return { value: text }
  if (setting.type === 'string') return setting.choices.length > 0 ? wrong(setting) : { value: text }
  const number = Number(text)
  const whole = setting.type === 'integer'
  if (
    text.trim() === '' ||
    !Number.isFinite(number) ||
    (whole && !Number.isSafeInteger(number)) ||
    (setting.minimum !== null && number < setting.minimum) ||
    (setting.maximum !== null && number > setting.maximum) ||
    (setting.above !== null && number <= setting.above) ||
    (setting.below !== null && number >= setting.below)
  ) {
    return wrong(setting)
  }
  return { value: number }
}

function wrong(setting: Setting): Parsed {
  return { error: `Choose ${setting.values_text}.` }
}

/** How a value is written in a field; the inverse of `parseSetting`. */
export function writeSetting(setting: Setting, value: Value): string {
  if (value === null) return ''
  if (Array.isArray(value)) return value.join(setting.type === 'string' ? '\n' : ', ')
  return String(value)
}

/** Names that the settings table does not have, but the form and links do. */
export const PRESET = 'preset'
/** of a question: which texts are one answer */
export const SAMENESS = ['by', 'answer_regex']

/** A form filled in: the values in force, the errors, and what to send. */
export interface Filled {
  /** every setting's value in force, chosen or not */
  values: Values
  errors: Record<string, string>
  /** names of the settings that count under the others' values */
  applies: Set<string>
  /** what the request holds: choices that apply and differ from what the preset gives */
  explicit: Values
}

/** What a setting is unless it is chosen: as the server has it, where it was started with another default. */
export function usual({ defaults }: SettingsTable, { name, default: own }: Setting, preset: Values = {}): Value {
  const here = defaults?.[name]
  return here !== undefined && !same(here, own) ? here : (preset[name] ?? own)
}

/** The same in words, for who may set it back. */
export function usualText(table: SettingsTable, setting: Setting, chosen: Chosen): string {
  const value = usual(table, setting, table.presets[chosen[PRESET] ?? ''])
  return same(value, setting.default) ? setting.default_text : writeSetting(setting, value)
}

export function fill(table: SettingsTable, chosen: Chosen): Filled {
  const preset = table.presets[chosen[PRESET] ?? ''] ?? {}
  const values: Values = {}
  const errors: Record<string, string> = {}
  const explicit: Values = {}
  for (const setting of table.settings) {
    values[setting.name] = usual(table, setting, preset)
    const text = chosen[setting.name]
    if (text === undefined) continue
    const parsed = parseSetting(setting, text)
    if (parsed.error !== undefined) errors[setting.name] = parsed.error
    else values[setting.name] = parsed.value
  }
  imply(table, values, chosen)
  const applies = new Set(table.settings.filter((s) => counts(table, s, values)).map((s) => s.name))
  for (const setting of table.settings) {
    if (!applies.has(setting.name)) {
      delete errors[setting.name] // what has no effect is not sent, so it cannot be wrong
      continue
    }
    if (chosen[setting.name] !== undefined && !same(values[setting.name], usual(table, setting, preset))) {
      explicit[setting.name] = values[setting.name]!
    }
  }
  if (chosen[PRESET] !== undefined && chosen[PRESET] in table.presets) explicit[PRESET] = chosen[PRESET]
  return { values, errors, applies, explicit }
}

/** What is chosen brings what it needs, where nothing else was said, so that the form shows it; the server does the same. */
function imply(table: SettingsTable, values: Values, chosen: Chosen): void {
  const common: Record<string, Value[]> = {}
  for (const setting of table.settings.filter((s) => chosen[s.name] !== undefined && values[s.name] !== false)) {
    for (const name of setting.implies) {
      const needed = (name === 'decoder' ? setting.decoders : setting.needs?.[name]) ?? []
      if (chosen[name] !== undefined || met(table, name, needed, values)) continue
      const allowed: Value[] = needed.length > 0 ? needed : [true]
      common[name] = (common[name] ?? allowed).filter((value) => allowed.some((other) => same(value, other)))
    }
  }
  for (const [name, [first]] of Object.entries(common)) if (first !== undefined) values[name] = first
}

/** A setting as people call it: its name in words. */
export function titleOf({ name }: Pick<Setting, 'name'>): string {
  return name.replaceAll('_', ' ')
}

/** What a setting does, without the spelling of the command line. */
export function helpOf({ help }: Pick<Setting, 'help'>): string {
  return help.replace(', on stderr', '').replace(/--([a-z-]+)/g, (_, flag: string) => `“${flag.replaceAll('-', ' ')}”`)
}

function counts(table: SettingsTable, setting: Setting, values: Values): boolean {
  if (!usedBy(setting, values)) return false
  const brought = setting.type === 'boolean' && values[setting.name] !== true ? setting.implies : []
  const needs = Object.entries(setting.needs ?? {}).filter(([name]) => !brought.includes(name))
  return needs.every(([name, allowed]) => met(table, name, allowed, values))
}

function met(table: SettingsTable, name: string, allowed: Value[], values: Values): boolean {
  const other = table.settings.find((s) => s.name === name)
  if (!other || !usedBy(other, values)) return true
  return allowed.length > 0 ? allowed.some((v) => same(v, values[name])) : !same(values[name], other.default)
}

function usedBy(setting: Setting, values: Values): boolean {
  return setting.decoders?.includes(String(values.decoder)) ?? true
}

function same(a: Value | undefined, b: Value | undefined): boolean {
  return JSON.stringify(a) === JSON.stringify(b)
}

/** A ready-made choice on the page: a preset of the server's, or one of its switches. */
export interface Recipe {
  name: string
  label: string
  help: string
  chosen: Chosen
  /** what it sets as well, to begin with */
  brings: Chosen
}

const RECIPES: Omit<Recipe, 'brings'>[] = [
  {
    name: 'lineage',
    label: 'Lineage',
    help: 'Members see the past in proportion to how likely it is their own. The default.',
    chosen: {},
  },
  {
    name: 'original',
    label: 'Original TEMPO',
    help: 'Every member sees all members, the last row decides, and attention prunes.',
    chosen: { preset: 'original' },
  },
  {
    name: 'branches',
    label: 'Branches',
    help: 'Exact tree decoding: several distinct continuations in one cache.',
    chosen: { preset: 'branches' },
  },
  {
    name: 'plain',
    label: 'Greedy',
    help: 'Ordinary decoding: one token a step, always the most probable.',
    chosen: { preset: 'plain', temperature: '0' },
  },
  {
    name: 'early-exit',
    label: 'Early exit',
    help: 'Leave the model at a layer that is calibrated to agree with the last.',
    chosen: { early_exit: 'true' },
  },
]

/** Which answers the model holds: the decoder of `ask`, with what the server asks with. */
function answers(table: SettingsTable): Recipe {
  const { decoder, ...rest } = table.ask
  const named = (name: string) => table.settings.find((s) => s.name === name)!
  const brings = Object.entries(rest).map(([name, value]) => [name, writeSetting(named(name), value)])
  return {
    name: 'answers',
    label: 'Answers',
    help: 'Which answers the model holds to a question, and how probable each is.',
    chosen: { decoder: String(decoder) },
    brings: { ...Object.fromEntries(brings), ...(table.chat && { chat: 'true' }) },
  }
}

/** The recipes that this server can serve. */
export function recipes(table: SettingsTable): Recipe[] {
  const all = [...RECIPES.map((recipe) => ({ ...recipe, brings: {} })), answers(table)]
  return all.filter(({ chosen }) =>
    Object.keys(chosen).every((name) =>
      name === PRESET ? chosen.preset! in table.presets : table.settings.some((s) => s.name === name),
    ),
  )
}

/** Which recipe the choices amount to: one of their preset, with all its choices made, the most specific. */
export function recipeOf(table: SettingsTable, chosen: Chosen): Recipe | undefined {
  const preset = (choices: Chosen) => choices[PRESET] ?? 'lineage'
  const matching = recipes(table).filter(
    (recipe) =>
      preset(recipe.chosen) === preset(chosen) &&
      Object.entries(recipe.chosen).every(([name, value]) => chosen[name] === value),
  )
  return matching.sort((a, b) => Object.keys(b.chosen).length - Object.keys(a.chosen).length)[0]
}

/** What is left of the choices when all changes are taken back: the recipe's, or the bare preset. */
export function unchanged(table: SettingsTable, chosen: Chosen): Chosen {
  const recipe = recipeOf(table, chosen)
  return recipe ? { ...recipe.brings, ...recipe.chosen } : { [PRESET]: chosen[PRESET]! }
}

/** Names of the choices that count and that the recipe did not make. */
export function changesIn(table: SettingsTable, chosen: Chosen, { explicit, errors }: Filled): Set<string> {
  const own = unchanged(table, chosen)
  const count = Object.keys({ ...explicit, ...errors })
  return new Set(count.filter((name) => name !== PRESET && chosen[name] !== own[name]))
}

/** Choose a recipe: what other recipes set goes, and so does what the new preset decides. */
export function chooseRecipe(table: SettingsTable, chosen: Chosen, recipe: Recipe): Chosen {
  const brought = Object.keys(recipeOf(table, chosen)?.brings ?? {})
  const decided = new Set([...recipes(table).flatMap((r) => Object.keys(r.chosen)), ...brought, 'decoder'])
  for (const values of Object.values(table.presets)) Object.keys(values).forEach((name) => decided.add(name))
  const kept = Object.entries(chosen).filter(([name]) => !decided.has(name))
  return { ...Object.fromEntries(kept), ...recipe.brings, ...recipe.chosen }
}

/** The choices as they are for the answers of a conversation, which are as long as they need to be. */
export function forAnswers({ answer_tokens }: SettingsTable, { system: _, ...chosen }: Chosen): Chosen {
  return { max_tokens: String(answer_tokens), ...chosen, chat: 'true' }
}

/** The choices that ask for a run's settings again, whatever version wrote them. */
export function choicesOf(table: SettingsTable, config: Values): Chosen {
  const values = { ...config }
  for (const [name, { setting, off }] of Object.entries(table.shortcuts)) {
    if (values[name] === false) values[setting] = off
  }
  if (!('logit_bias' in values)) {
    // of version 0.1.0, where these were selections and nothing else: as upgrade() in resolution.py
    for (const name of ['min_p', 'top_p', 'top_k']) {
      if (values.selection !== name.replace('_', '-')) delete values[name]
    }
  }
  const differs = (s: Setting) => s.name in values && !same(values[s.name], usual(table, s))
  return Object.fromEntries(table.settings.filter(differs).map((s) => [s.name, writeSetting(s, values[s.name]!)]))
}

// --- links: the fragment of the address, which never leaves the browser ---

export interface Link {
  prompt: string
  chosen: Chosen
}

/** `#prompt=...&threshold=0.2&seed=42`: what was chosen and applies, and always the seed. */
export function writeLink(table: SettingsTable, prompt: string, chosen: Chosen): string {
  const { explicit, values } = fill(table, chosen)
  const query = new URLSearchParams({ prompt })
  if (typeof explicit[PRESET] === 'string') query.set(PRESET, explicit[PRESET])
  for (const setting of table.settings) {
    const value = setting.name === 'seed' ? values.seed : explicit[setting.name]
    if (value !== undefined) query.set(setting.name, writeSetting(setting, value))
  }
  for (const name of SAMENESS) if (chosen[name]) query.set(name, chosen[name])
  return `#${query}`
}

/** Unknown names are reported, values are checked by the form itself. */
export function readLink(table: SettingsTable, fragment: string): Link & { unknown: string[] } {
  const query = new URLSearchParams(fragment.replace(/^#/, ''))
  const chosen: Chosen = {}
  const unknown: string[] = []
  for (const [name, text] of query) {
    if (name === 'prompt') continue
    const shortcut = table.shortcuts[name] // in links of version 0.1.0
    if (name === PRESET || SAMENESS.includes(name) || table.settings.some((s) => s.name === name)) chosen[name] = text
    else if (shortcut) chosen[shortcut.setting] ??= String((text === 'true' ? shortcut.on : shortcut.off) ?? '')
    else unknown.push(name)
  }
  return { prompt: query.get('prompt') ?? '', chosen, unknown }
}
