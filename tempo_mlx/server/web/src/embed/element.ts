/**
 * `<tempo-run src="run.json">`: a run on any page, from this one file. It fetches what `src` names and nothing else;
 * with the run inside, `<tempo-run><script type="application/json">...</script></tempo-run>`, nothing at all.
 */

import { mount } from 'svelte'
import '../app.css'
import { parseShown } from '../lib/shown'
import { attributes, STYLES } from './attributes.svelte'
import Viewer from './Viewer.svelte'

class TempoRun extends HTMLElement {
  static observedAttributes = ['src', 'theme', 'page']
  private readonly shown = attributes()

  connectedCallback(): void {
    if (this.shadowRoot) return
    const root = this.attachShadow({ mode: 'open' })
    const styles = new CSSStyleSheet()
    styles.replaceSync(STYLES)
    root.adoptedStyleSheets = [styles]
    mount(Viewer, { target: root, props: this.shown })
    // Parsed in front of its children, it has none yet.
    if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', () => void this.load())
    else void this.load()
  }

  attributeChangedCallback(name: string): void {
    this.shown.theme = this.getAttribute('theme')
    this.shown.page = this.hasAttribute('page')
    if (name === 'src' && this.shadowRoot && document.readyState !== 'loading') void this.load()
  }

  private async load(): Promise<void> {
    const src = this.getAttribute('src')
    try {
      const text = src === null ? this.querySelector('script[type="application/json"]')?.textContent : await read(src)
      if (!text?.trim()) throw new Error('There is no run here: give src, or put the JSON of a run inside.')
      if (src !== this.getAttribute('src')) return
      this.shown.shown = parseShown(text)
      this.shown.problem = ''
    } catch (error) {
      if (src !== this.getAttribute('src')) return
      this.shown.problem = (error as Error).message
    }
  }
}

async function read(src: string): Promise<string> {
  const response = await fetch(src).catch(() => {
    const remedy = location.protocol === 'file:' ? ' A page opened from disk needs the run inside it.' : ''
    throw new Error(`${src} cannot be read.${remedy}`)
  })
  if (!response.ok) throw new Error(`${src} cannot be read: ${response.status} ${response.statusText}.`)
  return response.text()
}

if (!customElements.get('tempo-run')) customElements.define('tempo-run', TempoRun)
