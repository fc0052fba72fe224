/** What the reader asks for: of which model, with which words and settings. */

import * as api from '../lib/api'
import type { Run, Values } from '../lib/run'
import { choicesOf, fill, forAnswers, type Chosen, type Filled, type SettingsTable } from '../lib/settings'
import { inTab } from '../lib/storage'

const FIRST_PROMPT = 'The capital of France is'
/** the model that this tab asks */
const MODEL = 'tempo-mlx.model'
export type Place = 'text' | 'talk'

export class Form {
  /** what the page is for at the moment: one text, or a conversation */
  place: Place = $state('text')
  table: SettingsTable | null = $state.raw(null)
  models: api.Model[] = $state.raw([])
  prompt = $state(FIRST_PROMPT)
  private choices: Record<Place, Chosen> = $state.raw({ text: {}, talk: {} })
  /** what was refused, by setting, and of what: once anything else is asked for, it says nothing */
  private refusal: { of: unknown[]; why: Record<string, string> } = $state.raw({ of: [], why: {} })

  /** what the reader chose, for texts and for conversations apart */
  get chosen(): Chosen {
    return this.choices[this.place]
  }

  set chosen(chosen: Chosen) {
    this.choices = { ...this.choices, [this.place]: chosen }
  }

  readonly filled: Filled | null = $derived(
    this.table && fill(this.table, this.place === 'talk' ? forAnswers(this.table, this.chosen) : this.chosen),
  )
  private readonly refused: Record<string, string> = $derived.by(() => {
    const asked = this.asked()
    return this.refusal.of.every((part, at) => part === asked[at]) ? this.refusal.why : {}
  })
  readonly errors: Record<string, string> = $derived({ ...this.refused, ...this.filled?.errors })
  readonly wrong: boolean = $derived(Object.keys(this.errors).length > 0)
  /** is it a question, with answers for a result? */
  readonly asking: boolean = $derived(this.filled?.values.decoder === this.table?.ask.decoder)

  /** what a request says of the model, where there are several */
  get which(): { model?: string } {
    return this.models.length > 1 && this.table ? { model: this.table.model } : {}
  }

  // --- the model ---

  async load(): Promise<void> {
    this.table = await api.getSettings()
    await this.listModels()
    await this.chooseModel(inTab.get(MODEL))
  }

  async listModels(): Promise<void> {
    this.models = (await api.getModels()).data
  }

  /** Ask this one from here on, if the server has it. It is loaded when it is asked. */
  async chooseModel(id: string | null): Promise<void> {
    if (id === this.table?.model || this.models.every((model) => model.id !== id)) return
    this.table = await api.getSettings(id!)
    inTab.set(MODEL, id!)
  }

  /** What is known of a model once it is loaded was not when the page was. */
  async learn(states: api.Health['models']): Promise<void> {
    const { table } = this
    if (table?.chat === null && states[table.model] === 'ready') this.table = await api.getSettings(table.model)
  }

  // --- prompt and settings ---

  choose(name: string, text: string | undefined): void {
    const { [name]: _, ...rest } = this.chosen
    this.chosen = text === undefined ? rest : { ...rest, [name]: text }
  }

  private asked(): unknown[] {
    return [this.place, this.prompt, this.chosen, this.table?.model]
  }

  /** Say at its field why a value was refused, where there is a field that has it. */
  refuse(name: string, why: string): void {
    const field = name === 'prompt' ? this.place === 'text' : this.table?.settings.some((one) => one.name === name)
    if (field) this.refusal = { of: this.asked(), why: { ...this.refused, [name]: why } }
  }

  /** Ask for a run again. The message of a chat cannot be told from its template, so the prompt stays as it is then. */
  fillFrom({ prompt, config }: Run): void {
    if (!this.table) return
    if (config.chat !== true) this.prompt = prompt.text
    this.chosen = choicesOf(this.table, config)
  }

  /** Body of a request for one text. */
  body(): Values {
    return { prompt: this.prompt, ...this.filled!.explicit, ...this.which }
  }

  /** Body of a question: what is in force, said outright, as the server asks with other defaults. */
  question(): Values {
    const { filled, table, chosen } = this
    const ask = Object.keys(table!.ask)
    const { choices } = filled!.values
    if (Array.isArray(choices) && choices.length > 0) {
      // Given answers are weighed: there is nothing to be found, so what says how to find it has no place here.
      const rest = Object.entries(filled!.explicit).filter(([name]) => !ask.includes(name))
      return { prompt: this.prompt, chat: filled!.values.chat!, ...Object.fromEntries(rest), ...this.which }
    }
    const given = ['chat', ...ask].filter((name) => filled!.applies.has(name))
    const values = Object.fromEntries(given.map((name) => [name, filled!.values[name]!]))
    const regex = chosen.by === 'regex'
    const same: Values = regex ? { answer_regex: chosen.answer_regex || '.+' } : { by: chosen.by ?? 'text' }
    return { prompt: this.prompt, ...values, ...filled!.explicit, ...same, ...this.which }
  }
}
