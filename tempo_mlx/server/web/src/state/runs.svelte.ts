/** The runs that this tab has open: which is shown, and how each is kept and found again. */

import * as api from '../lib/api'
import * as shelf from '../lib/shelf'
import type { Title } from '../lib/shelf'
import { parseShown } from '../lib/shown'
import { inTab } from '../lib/storage'
import { cut } from '../lib/text'
import type { Form } from './form.svelte'
import { nameOf, RunView } from './view.svelte'
import type { Work } from './work.svelte'

const MOST = 12
/** what the tab shows, kept for as long as the tab is */
const SHOWN = 'tempo-mlx.shown'
interface Shown {
  id: string
  name: string
  session: string | null
}

export class Runs {
  all: RunView[] = $state.raw([])
  current: RunView | null = $state.raw(null)
  /** the run that a first visit begins with */
  example: RunView | null = $state.raw(null)
  /** the run shown beside the current one */
  other: RunView | null = $state.raw(null)

  constructor(
    private form: Form,
    private work: Work,
  ) {}

  show(view: RunView): void {
    if (!this.all.includes(view)) {
      const kept = [...this.all, view]
      for (const old of kept.splice(0, kept.length - MOST)) this.letGo(old)
      this.all = kept
    }
    this.current = view
    if (this.other === view) this.other = null
    this.note()
    const { example } = this
    if (example && this.all.every((v) => v === example || v.root !== example) && view !== example) {
      this.example = null // nobody went on from it: it has shown what it was for
      this.close(example)
    }
  }

  close(view: RunView): void {
    this.letGo(view)
    this.all = this.all.filter((v) => v !== view)
    if (this.other === view) this.other = null
    if (this.current === view) this.current = this.all.at(-1) ?? null
  }

  letGo(view: RunView): void {
    if (view.session) void api.deleteSession(view.session.id).catch(() => undefined) // it would expire anyway
  }

  /** Note what this tab shows, for when it is loaded again. */
  note(): void {
    const { current } = this
    if (!current || current === this.example) return
    const shown: Shown = { id: current.id, name: current.name, session: current.session?.id ?? null }
    inTab.set(SHOWN, JSON.stringify(shown))
  }

  /** Show what this tab showed before it was loaded again, or else a finished run, so that there is something to read. */
  async begin(example: boolean): Promise<void> {
    await this.restore()
    if (example && !this.current && this.form.table) await this.showExample()
  }

  /** The session as it is on the server, or the run as it was kept. */
  private async restore(): Promise<void> {
    const { id, name, session } = noted()
    if (!id || !name || this.current || this.work.busy) return
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
    if (this.work.busy) return
    this.show(view)
    void this.keep(view)
  }

  private async showExample(): Promise<void> {
    const example = await api.getExample()
    if (this.current || this.work.busy) return
    this.example = RunView.of({ ...example, answers: null }, 'Example')
    this.show(this.example)
  }

  /** Keep a run in this browser. One that cannot keep anything (a private window, a full disk) goes without. */
  async keep(view: RunView): Promise<void> {
    const { id, name, run, phrases, answers } = view
    if (view === this.example || (view.lattice.length === 0 && !answers)) return
    const text = cut((answers?.answers[0]?.text ?? run.final_text).trim(), 120)
    const title = { id, name, at: Date.now(), text, steps: view.lattice.length }
    await shelf.keep(title, { id, run: { ...run, steps: view.lattice.steps }, phrases, answers }).catch(() => undefined)
  }

  async openKept({ id, name }: Title): Promise<void> {
    const known = this.all.find((view) => view.id === id)
    const kept = known ? null : await shelf.take(id).catch(() => undefined)
    if (known) this.show(known)
    if (!kept) return
    const view = RunView.of({ ...kept, answers: kept.answers ?? null }, name)
    view.id = id
    this.show(view)
    this.form.fillFrom(kept.run)
  }

  async importFile(file: File): Promise<void> {
    const { work, form } = this
    try {
      const { run, answers, ...shown } = parseShown(await file.text())
      const read = run && shown.phrases.length === 0 ? await api.readPhrases(run).catch(() => shown) : shown
      work.problem = null
      const view = RunView.of({ run, answers, phrases: read.phrases }, '')
      view.name = nameOf(view.run)
      this.show(view)
      if (run) form.fillFrom(run)
      void this.keep(view)
    } catch (error) {
      work.problem = { message: `${file.name}: ${(error as Error).message}`, code: 'file', retry: null, retryAt: null }
    }
  }
}

/** What the tab showed, as far as that can be read: other pages of this address may have written there. */
function noted(): Partial<Shown> {
  try {
    return (JSON.parse(inTab.get(SHOWN) ?? '{}') ?? {}) as Partial<Shown>
  } catch {
    return {}
  }
}
