/** The conversations that this browser keeps, and what can be done in the one that is open. */

import { SvelteMap } from 'svelte/reactivity'
import { findSession, requestId } from '../lib/api'
import { holding, isHeld } from '../lib/locks'
import type { Alternative, Phrase, Values } from '../lib/run'
import * as shelf from '../lib/shelf'
import {
  after,
  messagesTo,
  nextReading,
  pathOf,
  showing,
  under,
  type Answered,
  type Talk,
  type Turn,
} from '../lib/talk'
import { briefly } from '../lib/text'
import { eachOnce } from '../lib/texts'
import type { App } from './app.svelte'
import { RunView } from './view.svelte'
import type { Job } from './work.svelte'

/** milliseconds between two times that an answer is kept while it grows */
const KEEP_EVERY = 1000

export class Talks {
  /** newest first */
  all: Talk[] = $state.raw([])
  open: Talk | null = $state.raw(null)
  /** of the open one: whatever was said in it */
  turns: Turn[] = $state.raw([])
  /** the system prompt of a conversation that is not begun yet */
  system = $state('')
  /** what is to be said next, as far as it is written */
  draft = $state('')
  /** the answer that is being written */
  writing: string | null = $state(null)
  private views = new SvelteMap<string, RunView>()
  private looking = false

  constructor(private app: App) {}

  readonly path: Turn[] = $derived(this.open ? pathOf(this.open, this.turns) : [])
  /** the run in which a token is looked into */
  readonly inspected: RunView | null = $derived(
    this.path.map(({ id }) => this.views.get(id)).findLast((view) => view?.member) ?? null,
  )

  // --- which one is open ---

  async refresh(): Promise<void> {
    this.all = await shelf.talks().catch(() => (this.open ? [this.open] : []))
  }

  /** Open a conversation, or begin a new one. `visit`: the way back leads to what was shown before. */
  async show(id: string | null, visit = true): Promise<void> {
    await this.refresh()
    const talk = this.all.find((one) => one.id === id) ?? null
    if (talk?.id !== this.open?.id) this.leave()
    this.turns = talk ? await this.turnsOf(talk) : []
    this.open = talk
    this.system = talk?.system ?? ''
    if (talk) {
      this.app.form.chosen = talk.chosen
      await this.app.form.chooseModel(talk.model)
    }
    this.app.writeAddress(visit)
    await this.takeUp()
  }

  /** As they are kept, or where nothing can be kept, as they are here. */
  private turnsOf({ id }: Talk): Promise<Turn[]> {
    const here = this.open?.id === id ? this.turns : []
    return shelf.turnsOf(id).catch(() => here)
  }

  /** One token at a time is looked into. */
  lookOnly(view: RunView): void {
    for (const other of this.views.values()) if (other !== view) other.selected = null
  }

  private leave(): void {
    for (const [id, view] of this.views) {
      if (id === this.writing) continue
      this.app.runs.letGo(view)
      this.views.delete(id)
    }
  }

  async change(talk: Talk): Promise<void> {
    if (this.open?.id === talk.id) this.open = talk
    await shelf.keepTalk(talk).catch(() => undefined)
    await this.refresh()
  }

  async setSystem(system: string): Promise<void> {
    this.system = system
    if (this.open) await this.change({ ...this.open, system })
  }

  async drop(talk: Talk): Promise<void> {
    await shelf.dropTalk(talk.id).catch(() => undefined)
    if (this.open?.id === talk.id) await this.show(null)
    else await this.refresh()
  }

  /** A turn, all that follows it, and what was kept of them. */
  async dropTurn(turn: Turn): Promise<void> {
    const gone = under(this.turns, turn)
    this.turns = this.turns.filter((one) => !gone.includes(one))
    await shelf.dropTurns(gone, this.turns).catch(() => undefined)
  }

  async showTurn(turn: Turn): Promise<void> {
    if (this.open) await this.change({ ...this.open, shown: showing(this.open, this.turns, turn) })
  }

  siblings(turn: Turn): Turn[] {
    return after(this.turns, turn.parent)
  }

  /** The run of an answer. What this browser has kept of it comes a moment later. */
  viewOf(turn: Turn): RunView | null {
    if (!turn.answer) return null
    const known = this.views.get(turn.id)
    if (known) return known
    const view = new RunView(briefly(turn.text))
    view.id = turn.answer.run
    this.views.set(turn.id, view)
    void this.load(view)
    return view
  }

  private async load(view: RunView): Promise<void> {
    const kept = await shelf.take(view.id).catch(() => undefined)
    if (kept && view.lattice.length === 0) view.load(kept.run, kept.phrases)
  }

  // --- what is said ---

  /** Ask something after `parent`: the last turn, unless another is meant. */
  async ask(text: string, parent: string | null = this.path.at(-1)?.id ?? null): Promise<void> {
    const { app } = this
    if (app.work.busy || !app.form.filled || text.trim() === '' || app.form.wrong) return
    app.work.activity = { kind: 'waiting', position: null } // from here on nothing else can begin
    const at = Date.now()
    const begun = this.open ?? { id: requestId(), name: briefly(text), system: this.system, shown: {} }
    const talk: Talk = { ...begun, at, chosen: app.form.chosen, model: app.form.table!.model }
    this.open = talk
    const question: Turn = { id: requestId(), talk: talk.id, parent, role: 'user', text: text.trim(), at, answer: null }
    await this.put(question)
    await this.showTurn(question)
    app.writeAddress()
    await this.reply(question)
  }

  /** Answer a question that has no answer. */
  async answer(question: Turn): Promise<void> {
    if (!this.app.work.busy) await this.reply(question)
  }

  private async reply(question: Turn, more: Values = {}): Promise<void> {
    const { app } = this
    const { filled, which } = app.form
    if (!filled || !this.open) return
    const messages = messagesTo(this.open.system, this.turns, question)
    const body = { ...filled.explicit, ...more, ...which, messages }
    const view = new RunView(this.open.name)
    const turn = this.newAnswer(question.id, view)
    const whole = await this.write(turn, view, (id, signal) =>
      app.decoding.decode(view, body, filled, id, signal, () => undefined),
    )
    if (!whole || view.run.decoder === 'superposed') return
    for (const { path, index } of eachOnce(view.run.paths).slice(1)) {
      // Several texts of one run stand in each other's place, too.
      await this.put({ ...whole, id: requestId(), at: whole.at + index, text: path.text.trim() })
    }
  }

  /** What else the model would say: the next reading of what it held, or, where the settings draw or differ, a new answer. */
  async another(turn: Turn): Promise<void> {
    const { app } = this
    const question = this.turns.find(({ id }) => id === turn.parent)
    const view = this.viewOf(turn)
    if (app.work.busy || !app.form.filled || !question || !view) return
    const others = this.siblings(turn)
    if (turn.answer!.asked !== this.asked()) return this.reply(question)
    if (app.form.filled.values.decoder !== 'superposed') {
      await this.reply(question, { seed: Number(app.form.filled.values.seed) + others.length })
      const newest = this.siblings(turn).at(-1)!
      if (others.every(({ id, text }) => id !== newest.id && text !== newest.text)) return
      if (others.every(({ id }) => id !== newest.id)) await this.dropTurn(newest)
      await this.showTurn(turn)
      app.work.notice = 'It says the same again under these settings. A temperature above 0 lets it say something else.'
      return
    }
    const next = nextReading(view.phrases, others.map(({ text }) => text)) // prettier-ignore
    if (next) return this.take(turn, next.phrase, next.other)
    app.work.notice =
      'The model held nothing else that is probable enough. A lower threshold lets more in; so does another preset.'
  }

  /** Say `other` in place of a phrase of an answer, and go on from there. The answer stays, in another branch. */
  async take(turn: Turn, phrase: Phrase, other: Alternative): Promise<void> {
    const old = this.viewOf(turn)
    if (this.app.work.busy || !old) return
    const view = new RunView(old.name)
    const taken = this.newAnswer(turn.parent, view, other.text.trim(), turn.answer!.asked)
    const job = async (id: string, signal: AbortSignal) => {
      await this.app.decoding.part(old, view, phrase, other, id, signal)
      await this.app.decoding.extend(view, left(view), id, signal)
    }
    await this.write(taken, view, job, () => (view.session ? view : old))
  }

  /** Go on with an answer that is not whole, from wherever it is still held. */
  async goOn(turn: Turn): Promise<void> {
    const { app } = this
    const question = this.turns.find(({ id }) => id === turn.parent)
    const view = this.viewOf(turn)
    if (app.work.busy || !app.form.filled || !view || !question) return
    await this.load(view)
    if (await isHeld(turn.id)) return // another tab writes it
    const { session } = turn.answer!
    if (!view.session && session) {
      const state = await findSession(session)
      if (state === 'busy') return // another tab or page does
      if (state) view.setSession(state)
    }
    if (view.lattice.length > 0 && app.decoding.whyFixed(view) === null) {
      const more = turn.answer!.state === 'length' ? Number(app.form.filled.values.max_tokens) : left(view)
      await this.write(turn, view, (id, signal) => app.decoding.extend(view, more, id, signal))
    } else {
      await this.dropTurn(turn)
      await this.reply(question)
    }
  }

  /** Go on with an answer that a reload, or a server that went away, has cut off. */
  async takeUp(): Promise<void> {
    const { app } = this
    const cut = () => this.path.findLast((turn) => turn.answer?.state === 'growing' && turn === this.path.at(-1))
    const { health } = app.work
    if (app.form.place !== 'talk' || app.work.busy || app.work.problem || this.looking || !this.open || !cut()) return
    if (health === 'unreachable' || (health && health.status !== 'ok')) return // it is asked again, every now and then
    this.looking = true
    const { open } = this
    const turns = await this.turnsOf(open) // another tab may have written it
    if (this.open?.id === open.id) this.turns = turns
    const last = cut()
    if (last && !app.work.busy) await this.goOn(last)
    this.looking = false
  }

  private asked(): string {
    const { filled, table } = this.app.form
    return JSON.stringify([filled?.explicit, this.open?.system, table?.model])
  }

  private newAnswer(parent: string | null, view: RunView, taken: string | null = null, asked = this.asked()): Turn {
    const answer: Answered = { run: view.id, state: 'growing', session: null, asked, taken }
    return { id: requestId(), talk: this.open!.id, parent, role: 'assistant', text: '', at: Date.now(), answer }
  }

  /** Let `job` write an answer: it is kept as it grows, and is there again however this ends. */
  private async write(turn: Turn, view: RunView, job: Job, held = () => view): Promise<Turn | null> {
    const { app } = this
    this.views.set(turn.id, view)
    this.writing = turn.id
    const keep = async (state: Answered['state']) => {
      const answer = { ...turn.answer!, state, session: view.session?.id ?? null }
      const kept = { ...turn, text: view.text.trim(), answer }
      await this.put(kept, view.lattice.length > 0 ? { id: view.id, ...view.soFar() } : null)
      return kept
    }
    const timer = setInterval(() => void keep('growing'), KEEP_EVERY)
    const retry = () => void (view.lattice.length > 0 ? this.goOn(turn) : this.write(turn, view, job, held))
    const begin: Job = async (id, signal) => {
      await this.showTurn(await keep('growing'))
      await job(id, signal)
    }
    await holding(turn.id, () => app.work.attempt(held, retry, begin, () => view.end()))
    clearInterval(timer)
    this.writing = null
    if (view.lattice.length > 0 || app.work.problem?.retry) return keep(app.work.problem ? 'growing' : stateOf(view))
    await this.dropTurn(turn) // nothing came of it, and nothing will
    return null
  }

  private async put(turn: Turn, run: shelf.Kept | null = null): Promise<void> {
    if (this.open?.id === turn.talk) this.turns = [...this.turns.filter(({ id }) => id !== turn.id), turn]
    await shelf.keepTurn(turn, run).catch(() => undefined)
  }
}

function stateOf({ session, run, lattice }: RunView): Answered['state'] {
  if (session ? session.finished === 'stop' : run.finish_reason === 'stop') return 'whole'
  return lattice.length >= Number(run.config.max_tokens) ? 'length' : 'stopped'
}

/** Steps that an answer may still have. */
function left({ run, lattice }: RunView): number {
  return Math.max(1, Number(run.config.max_tokens) - lattice.length)
}
