/** What the page knows and does. One instance, made in main.ts and handed down as a context. */

import * as api from '../lib/api'
import { ApiError, type Session, type StepDetail } from '../lib/api'
import type { Alternative, Phrase, Run, Values } from '../lib/run'
import {
  choicesOf,
  fill,
  forAnswers,
  readLink,
  writeLink,
  type Chosen,
  type Form,
  type SettingsTable,
} from '../lib/settings'
import { parseShown } from '../lib/shown'
import * as shelf from '../lib/shelf'
import type { Title } from '../lib/shelf'
import { Talks } from './talks.svelte'
import { nameOf, RunView } from './view.svelte'

export type Activity =
  | { kind: 'idle' }
  | { kind: 'waiting'; position: number | null }
  | { kind: 'running' }
  | { kind: 'editing'; what: string }

export interface Problem {
  message: string
  code: string
  /** what "Try again" does */
  retry: (() => void) | null
  retryAt: number | null
}

export const FIRST_PROMPT = 'The capital of France is'
const KEPT_RUNS = 12
/** what the tab shows, kept for as long as the tab is */
const SHOWN = 'tempo-mlx.shown'
const MODEL = 'tempo-mlx.model'
interface Shown {
  id: string
  name: string
  session: string | null
}
/** the address of a conversation, or of a new one */
const CONVERSATION = /^#conversation(?:=([\w-]+))?$/
export type Place = 'text' | 'talk'
type Job = (id: string, signal: AbortSignal) => Promise<void>
/** steps that a text goes on for, at least, when another word is taken in it */
const GO_ON = 20

export class App {
  table: SettingsTable | null = $state.raw(null)
  models: api.Model[] = $state.raw([])
  health: api.Health | 'unreachable' | null = $state.raw(null)
  prompt = $state(FIRST_PROMPT)
  private choices: Record<Place, Chosen> = $state.raw({ text: {}, talk: {} })
  /** what the server refused, by setting; forgotten when the setting changes */
  refused: Record<string, string> = $state.raw({})
  notice: string | null = $state(null)
  problem: Problem | null = $state.raw(null)
  activity: Activity = $state.raw({ kind: 'idle' })
  views: RunView[] = $state.raw([])
  view: RunView | null = $state.raw(null)
  /** the run that a first visit begins with */
  example: RunView | null = $state.raw(null)
  /** the run shown beside the current one */
  other: RunView | null = $state.raw(null)
  /** what the page is for at the moment: one text, or a conversation */
  place: Place = $state('text')
  readonly talks = new Talks(this)
  private request: { id: string; abort: AbortController } | null = null
  private link = ''
  /** the server did not answer when it was last asked how it is */
  private missed = false

  /** what the reader chose, for texts and for conversations apart */
  get chosen(): Chosen {
    return this.choices[this.place]
  }

  set chosen(chosen: Chosen) {
    this.choices = { ...this.choices, [this.place]: chosen }
  }

  /** what a request says of the model, where there are several */
  get which(): { model?: string } {
    return this.models.length > 1 && this.table ? { model: this.table.model } : {}
  }

  readonly form: Form | null = $derived(
    this.table && fill(this.table, this.place === 'talk' ? forAnswers(this.table, this.chosen) : this.chosen),
  )
  readonly errors: Record<string, string> = $derived({ ...this.refused, ...this.form?.errors })
  readonly busy: boolean = $derived(this.activity.kind !== 'idle')
  /** is what the form asks for a question, with answers for a result? */
  readonly asking: boolean = $derived(this.form?.values.decoder === this.table?.ask.decoder)
  /** what is going on, in a few words */
  readonly status: string = $derived.by(() => {
    const { activity, health } = this
    if (activity.kind === 'editing') return activity.what
    if (activity.kind !== 'waiting') return ''
    if (activity.position !== null) return `Waiting, ${activity.position} in front`
    const busy = health !== null && health !== 'unreachable' && health.waiting > 0
    return busy ? 'Waiting for other requests' : 'Reading the prompt'
  })
  /** why the run can only be looked at, in a sentence; null where the server can open it as a session, '' without one */
  readonly fixed: string | null = $derived(this.view && this.whyFixed(this.view))
  readonly interactive: boolean = $derived(!!this.view && this.fixed === null)

  whyFixed(view: RunView): string | null {
    const { table } = this
    if (!table) return ''
    const needed = 'Branching, pinning and removing'
    const decoders = table.session_decoders
    if (decoders.length === 0) return `${needed} need sessions, which this server does not keep.`
    if (!decoders.includes(view.run.decoder)) return `${needed} need a run with decoder ${decoders.join(' or ')}.`
    if (view.run.config.early_exit === true) return `${needed} need every layer, so a run without early exit.`
    return null
  }

  // --- models, settings and links ---

  async listModels(): Promise<void> {
    this.models = (await api.getModels()).data
  }

  /** Ask this one from here on, if the server has it. It is loaded when it is asked. */
  async chooseModel(id: string | null): Promise<void> {
    if (id === this.table?.model || this.models.every((model) => model.id !== id)) return
    this.table = await api.getSettings(id!)
    sessionStorage.setItem(MODEL, id!)
  }

  async start(): Promise<void> {
    try {
      this.table = await api.getSettings()
      this.problem = null
      await this.listModels()
      await this.chooseModel(sessionStorage.getItem(MODEL))
      await this.arrive()
    } catch (error) {
      this.fail(error, () => void this.start())
    }
  }

  /** Show what the address says, or else what this tab showed last, or else the example. */
  async arrive(): Promise<void> {
    await this.readAddress()
    if (this.place === 'text') await this.beginWith(location.hash.length < 2)
  }

  private async beginWith(example: boolean): Promise<void> {
    await this.restore()
    if (example && !this.view && this.table) await this.showExample()
  }

  /** What this tab showed before it was loaded again: the session as it is on the server, or the run as it was kept. */
  private async restore(): Promise<void> {
    const { id, name, session } = JSON.parse(sessionStorage.getItem(SHOWN) ?? '{}') as Partial<Shown>
    if (!id || !name || this.view || this.busy) return
    const view = new RunView(name)
    view.id = id
    const found = session ? await api.findSession(session) : null
    const state = found === 'busy' ? null : found
    const kept = state ? null : await shelf.take(id).catch(() => undefined)
    if (state) view.setSession(state)
    else if (kept) {
      view.answers = kept.answers ?? null
      view.load(kept.run, kept.phrases)
    } else return
    if (this.busy) return
    this.show(view)
    void this.keep(view)
  }

  /** Keep a run in this browser. One that cannot keep anything (a private window, a full disk) goes without. */
  private async keep(view: RunView): Promise<void> {
    const { id, name, run, phrases, answers } = view
    if (view === this.example || (view.lattice.length === 0 && !answers)) return
    const text = (answers?.answers[0]?.text ?? run.final_text).trim().slice(0, 120)
    const title = { id, name, at: Date.now(), text, steps: view.lattice.length }
    await shelf.keep(title, { id, run: { ...run, steps: view.lattice.steps }, phrases, answers }).catch(() => undefined)
  }

  async openKept({ id, name }: Title): Promise<void> {
    const known = this.views.find((view) => view.id === id)
    const kept = known ? null : await shelf.take(id)
    if (known) this.show(known)
    if (!kept) return
    const view = RunView.of({ ...kept, answers: kept.answers ?? null }, name)
    view.id = id
    this.show(view)
    this.fillFrom(kept.run)
  }

  /** Note what this tab shows, for when it is loaded again. */
  private note(): void {
    const { view } = this
    if (!view || view === this.example) return
    const shown: Shown = { id: view.id, name: view.name, session: view.session?.id ?? null }
    sessionStorage.setItem(SHOWN, JSON.stringify(shown))
  }

  /** A finished run, so that a first visit begins with something to read. */
  private async showExample(): Promise<void> {
    const example = await api.getExample()
    if (this.view || this.busy) return
    this.example = RunView.of({ ...example, answers: null }, 'Example')
    this.show(this.example)
  }

  /** Take prompt and settings from the address, unless it is what this page wrote there. */
  private async readAddress(): Promise<void> {
    if (!this.table || location.hash === this.link) return
    const talk = CONVERSATION.exec(location.hash)
    this.place = talk ? 'talk' : 'text'
    if (talk) return this.talks.show(talk[1] ?? null)
    if (location.hash.length < 2) return
    const { prompt, chosen, unknown } = readLink(this.table, location.hash)
    this.prompt = prompt
    this.chosen = chosen
    this.refused = {}
    this.notice =
      unknown.length > 0 ? `The link holds settings that this server does not know: ${unknown.join(', ')}.` : null
  }

  /** `visit`: to where the way back leads from here. */
  writeAddress(visit = false): void {
    if (!this.table) return
    const { open } = this.talks
    if (this.place === 'text') this.link = writeLink(this.table, this.prompt, this.chosen)
    else this.link = open ? `#conversation=${open.id}` : '#conversation'
    if (this.link === location.hash) return
    if (visit) history.pushState(null, '', this.link)
    else history.replaceState(null, '', this.link)
  }

  /** Go to the text, or to the conversation, as it was left. */
  async goTo(place: Place): Promise<void> {
    this.place = place
    this.writeAddress(true)
    if (place === 'talk') await this.talks.show(this.talks.open?.id ?? null)
    else await this.beginWith(true)
  }

  /** An answer as a text by itself, to work on; in the conversation it stays as it is. */
  async openAlone(view: RunView): Promise<void> {
    const { run, phrases } = structuredClone(view.soFar())
    const copy = RunView.of({ run, phrases, answers: null }, view.name)
    copy.selected = view.selected
    await this.goTo('text')
    this.show(copy)
    void this.keep(copy)
  }

  choose(name: string, text: string | undefined): void {
    const { [name]: _, ...rest } = this.chosen
    this.chosen = text === undefined ? rest : { ...rest, [name]: text }
    this.forget(name)
  }

  private forget(name: string): void {
    const { [name]: _, ...rest } = this.refused
    this.refused = rest
  }

  // --- runs ---

  show(view: RunView): void {
    if (!this.views.includes(view)) {
      const kept = [...this.views, view]
      for (const old of kept.splice(0, kept.length - KEPT_RUNS)) this.letGo(old)
      this.views = kept
    }
    this.view = view
    if (this.other === view) this.other = null
    this.note()
    const { example } = this
    if (example && this.views.every((v) => v === example || v.root !== example) && view !== example) {
      this.example = null // nobody went on from it: it has shown what it was for
      this.close(example)
    }
  }

  close(view: RunView): void {
    this.letGo(view)
    this.views = this.views.filter((v) => v !== view)
    if (this.other === view) this.other = null
    if (this.view === view) this.view = this.views.at(-1) ?? null
  }

  letGo(view: RunView): void {
    if (view.session) void api.deleteSession(view.session.id).catch(() => undefined) // it would expire anyway
  }

  async importFile(file: File): Promise<void> {
    try {
      const { run, answers, ...shown } = parseShown(await file.text())
      const read = run && shown.phrases.length === 0 ? await api.readPhrases(run).catch(() => shown) : shown
      this.problem = null
      const view = RunView.of({ run, answers, phrases: read.phrases }, '')
      view.name = nameOf(view.run)
      this.show(view)
      if (run) this.fillFrom(run)
      void this.keep(view)
    } catch (error) {
      this.problem = { message: `${file.name}: ${(error as Error).message}`, code: 'file', retry: null, retryAt: null }
    }
  }

  /** Let the form ask for a run again. The message of a chat cannot be told from its template, so that one stays. */
  fillFrom({ prompt, config }: Run): void {
    if (!this.table) return
    if (config.chat !== true) this.prompt = prompt.text
    this.chosen = choicesOf(this.table, config)
    this.refused = {}
  }

  async generate(): Promise<void> {
    const { form, table } = this
    if (this.busy || !form || !table) return
    if (this.prompt.trim() === '') this.refused = { ...this.refused, prompt: 'Write a prompt first.' }
    if (Object.keys(this.errors).length > 0) {
      document.querySelector<HTMLElement>('[aria-invalid="true"]')?.focus()
      return
    }
    this.writeAddress()
    const body = { prompt: this.prompt, ...form.explicit, ...this.which }
    const view = new RunView(nameOf({ prompt: { text: this.prompt } }))
    const retry = () => void this.generate()
    await this.work(view, retry, (id, signal) =>
      this.asking
        ? this.watchAnswers(view, api.stream('ask/stream', this.question(), id, signal))
        : this.decode(view, body, form, id, signal, () => this.show(view)),
    )
  }

  /** Run what `body` asks for, which the form's values are part of. `begun`: there is something to be seen. */
  async decode(
    view: RunView,
    body: object,
    { values }: Form,
    id: string,
    signal: AbortSignal,
    begun: () => void,
  ): Promise<void> {
    // A session has no end, so it reads no paths off (the finished run can still be opened as one), and it goes
    // through the whole model.
    const plain = Number(values.paths ?? 0) > 0 || values.early_exit === true
    if (plain || !this.table?.session_decoders.includes(String(values.decoder))) {
      await this.watch(view, api.stream('generate/stream', body, id, signal), begun)
      return
    }
    view.setSession(await api.createSession({ ...body, steps: 0 }, id, signal))
    begun()
    await this.extend(view, Number(values.max_tokens), id, signal)
  }

  /** Go on with a run by some steps. One that the server does not hold is replayed there first. */
  async extend(view: RunView, steps: number, id: string, signal: AbortSignal): Promise<void> {
    await this.ensureSession(view, id, signal)
    if (view.session!.finished === 'stop' || steps < 1) return
    await this.watch(view, api.stream(`sessions/${view.session!.id}/continue/stream`, { steps }, id, signal))
  }

  /** Generate what follows a text of a run, under the settings of the form. */
  async goOnWith(text: string): Promise<void> {
    if (this.busy || !this.view) return
    this.prompt = this.view.run.prompt.text + text
    await this.generate()
  }

  /** Ask the server to end the run; the stream then closes by itself, with what was generated. */
  async stop(): Promise<void> {
    const request = this.request
    if (!request) return
    try {
      await api.cancelRequest(request.id)
    } catch {
      request.abort.abort() // it never got so far, or the server is gone: closing the connection cancels as well
    }
  }

  /** Body of a question: what is in force, said outright, as the server asks with other defaults. */
  private question(): Values {
    const { form, table, chosen } = this
    const given = ['chat', ...Object.keys(table!.ask)].filter((name) => form!.applies.has(name))
    const values = Object.fromEntries(given.map((name) => [name, form!.values[name]!]))
    const regex = chosen.by === 'regex'
    const same: Values = regex ? { answer_regex: chosen.answer_regex || '.+' } : { by: chosen.by ?? 'text' }
    const choices = Array.isArray(form!.values.choices) && form!.values.choices.length > 0
    return { prompt: this.prompt, ...values, ...form!.explicit, ...(choices ? {} : same), ...this.which }
  }

  private async watchAnswers(view: RunView, events: AsyncGenerator<api.StreamEvent>): Promise<void> {
    for await (const { event, data } of events) {
      if (event === 'queued') this.activity = { kind: 'waiting', position: data.position }
      else if (event === 'step') this.activity = { kind: 'running' }
      else if (event === 'found' || event === 'answers') {
        view.answer(data, event === 'answers')
        this.show(view)
      }
    }
  }

  private async watch(view: RunView, events: AsyncGenerator<api.StreamEvent>, begun?: () => void): Promise<void> {
    let phrases: Phrase[] = []
    for await (const { event, data } of events) {
      if (event === 'queued') this.activity = { kind: 'waiting', position: data.position }
      else if (event === 'start') {
        view.describe(data)
        begun?.()
      } else if (event === 'step') {
        if (this.activity.kind !== 'running') this.activity = { kind: 'running' }
        view.add(data)
      } else if (event === 'phrases') phrases = data.phrases
      else if (event === 'run') view.load(data, phrases)
      else if (event === 'session') view.setSession(data)
    }
  }

  private work(view: RunView | null, retry: () => void, job: Job): Promise<void> {
    return this.attempt(
      () => this.view,
      retry,
      job,
      () => {
        view?.end()
        if (view && !this.views.includes(view)) this.letGo(view)
        const changed = view ?? this.view
        if (changed && this.views.includes(changed)) void this.keep(changed)
        this.note()
      },
    )
  }

  /**
   * One thing at a time: run `job` under a request id, and put whatever goes wrong where the reader sees it. `held`: the
   * run whose session it needs; `done`: what there is to do however it ended.
   */
  async attempt(held: () => RunView | null, retry: () => void, job: Job, done: () => void): Promise<void> {
    const request = { id: api.requestId(), abort: new AbortController() }
    this.request = request
    this.problem = null
    this.notice = null
    if (this.activity.kind === 'idle') this.activity = { kind: 'waiting', position: null }
    const look = setTimeout(() => void this.watchHealth(), 1000) // is it the queue that takes so long?
    try {
      await job(request.id, request.abort.signal).catch((error: unknown) => {
        const view = held()
        if (!isLost(error) || !view?.session) throw error
        view.session = null // evicted, or the server was restarted: the job opens the run there again
        return job(request.id, request.abort.signal)
      })
    } catch (error) {
      if (!request.abort.signal.aborted) this.fail(error, retry)
    } finally {
      done()
      clearTimeout(look)
      this.request = null
      this.activity = { kind: 'idle' }
      void this.watchHealth()
    }
  }

  private fail(error: unknown, retry: () => void): void {
    if (!(error instanceof ApiError)) throw error
    if (error.code === 'cancelled') return
    if (error.code === 'unreachable' || error.code === 'cut_off') this.health = 'unreachable'
    const name = error.param?.replace(/^tempo\./, '')
    if (error.code === 'invalid_value' && name) this.refused = { ...this.refused, [name]: error.message }
    const lost = isLost(error)
    const canRetry = lost || [0, 401, 429, 503].includes(error.status)
    this.problem = {
      message: lost ? 'The server no longer holds this run. It can be opened there again.' : error.message,
      code: error.code,
      retry: canRetry ? retry : null,
      retryAt: error.retryAfter === null ? null : Date.now() + 1000 * error.retryAfter,
    }
  }

  // --- sessions: the lattice as something to work on ---

  branch(step: number, tokenId: number): Promise<void> {
    return this.edit('branch', { step, token_id: tokenId }, 'Branching')
  }

  pin(slot: number, pinned: boolean): Promise<void> {
    return this.edit('pin', { slot, pinned }, pinned ? 'Pinning' : 'Unpinning')
  }

  remove(slot: number): Promise<void> {
    return this.edit('remove', { slot }, 'Removing')
  }

  undo(): Promise<void> {
    return this.edit('undo', {}, 'Undoing')
  }

  redo(): Promise<void> {
    return this.edit('redo', {}, 'Redoing')
  }

  async continue(steps: number): Promise<void> {
    const view = this.view
    if (!view || this.busy) return
    const retry = () => void this.continue(steps)
    await this.work(view, retry, (id, signal) => this.extend(view, steps, id, signal))
  }

  /** Say `other` in place of a phrase and go on from there; the text as it was stays beside the new one. */
  async take(phrase: Phrase, other: Alternative): Promise<void> {
    const old = this.view
    if (!old || this.busy) return
    const view = new RunView(old.name, { view: old, taken: other.text.trim() })
    this.activity = { kind: 'editing', what: `Taking “${other.text.trim()}”` }
    const retry = () => void this.take(phrase, other)
    await this.work(view, retry, async (id, signal) => {
      await this.part(old, view, phrase, other, id, signal)
      this.show(view)
      await this.extend(view, Math.max(GO_ON, old.lattice.length - view.lattice.length), id, signal)
    })
  }

  /** Let `view` be `old` up to a phrase, and then what is said in its place. */
  async part(
    old: RunView,
    view: RunView,
    phrase: Phrase,
    other: Alternative,
    id: string,
    signal: AbortSignal,
  ): Promise<void> {
    if (view.lattice.length > 0) return // it was done before the session was lost
    const [token_id, ...then] = other.slots.flatMap((slot) => old.lattice.memberAtSlot(slot ?? -1)?.token.id ?? [])
    await this.ensureSession(old, id, signal)
    const step = phrase.start
    view.setSession(await api.editSession(old.session!.id, 'branch', { step, token_id, then }))
    old.session = null // it goes on with the new text; what it was is kept whole, and can be opened again
  }

  /** A member's next tokens and the reason it was kept or pruned, from the server. */
  async detail(view: RunView, step: number): Promise<StepDetail | null> {
    if (!view.session) return null
    try {
      return await api.getStep(view.session.id, step)
    } catch (error) {
      if (isLost(error)) {
        view.session = null
        if (view === this.view) void this.open()
      } else this.fail(error, () => void this.open())
      return null
    }
  }

  /** Open a run that the server does not hold: it is replayed there. */
  async open(): Promise<void> {
    const view = this.view
    if (!view || this.busy) return
    this.activity = { kind: 'editing', what: 'Opening the run on the server' }
    await this.work(
      null,
      () => void this.open(),
      (id, signal) => this.ensureSession(view, id, signal),
    )
  }

  private async edit(action: string, body: object, what: string): Promise<void> {
    const view = this.view
    if (!view || this.busy) return
    this.activity = { kind: 'editing', what }
    await this.work(
      null,
      () => void this.edit(action, body, what),
      async (id, signal) => {
        await this.ensureSession(view, id, signal)
        view.setSession(await api.editSession(view.session!.id, action, body))
      },
    )
  }

  private async ensureSession(view: RunView, id: string, signal: AbortSignal): Promise<void> {
    if (!view.session) view.setSession(await api.createSession({ run: view.run }, id, signal))
  }

  // --- health ---

  async watchHealth(): Promise<void> {
    try {
      this.health = await api.getHealth()
      const { table } = this
      // What is known of a model once it is loaded was not when the page was.
      if (table?.chat === null && this.health.models[table.model] === 'ready')
        this.table = await api.getSettings(table.model)
      if (!this.table && this.problem?.code === 'unreachable') this.problem.retry?.()
      else if (this.missed && ['unreachable', 'cut_off'].includes(this.problem?.code ?? '')) this.problem = null // it is over
      this.missed = false
      void this.talks.takeUp()
    } catch {
      this.missed = true
      this.health = 'unreachable'
    }
  }
}

/** The server no longer holds the session: it was evicted, or the server was started again. */
function isLost(error: unknown): boolean {
  return error instanceof ApiError && error.code.startsWith('session_')
}

export type { Session }
