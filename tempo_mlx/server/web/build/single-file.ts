/** Vite plugins that finish the build: a strict policy for the page, the page as one file, and what it was built from. */

import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Plugin, Rolldown } from 'vite'

const POLICY = "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'"

/** `index.html` with a policy that allows the page's own files only, and `standalone.html` with everything inside. */
export function singleFile(): Plugin {
  return {
    name: 'single-file',
    apply: 'build',
    enforce: 'post',
    generateBundle(_, bundle) {
      const page = bundle['index.html'] as Rolldown.OutputAsset
      const html = String(page.source)
      page.source = withPolicy(html, `${POLICY}; script-src 'self'; style-src 'self'`)
      this.emitFile({ type: 'asset', fileName: 'standalone.html', source: inline(html, bundle) })
      this.emitFile({ type: 'asset', fileName: 'SOURCES.sha256', source: `${hashOfSources(process.cwd())}\n` })
    },
  }
}

function inline(html: string, bundle: Rolldown.OutputBundle): string {
  const scripts: string[] = []
  const styles: string[] = []
  const bare = html
    .replace(/\s*<script [^>]*src="\.\/([^"]+)"[^>]*><\/script>/g, (_, name: string) => {
      scripts.push((bundle[name] as Rolldown.OutputChunk).code.trim().replaceAll('</script', '<\\/script'))
      return ''
    })
    .replace(/\s*<link rel="stylesheet"[^>]*href="\.\/([^"]+)"[^>]*>/g, (_, name: string) => {
      styles.push(String((bundle[name] as Rolldown.OutputAsset).source).trim())
      return ''
    })
    .replace(/\s*<link rel="icon"[^>]*>/, '')
  if (scripts.length !== 1 || styles.length !== 1) throw new Error('One script and one style sheet were expected.')
  const policy = `default-src 'none'; script-src ${hashOf(scripts[0]!)}; style-src ${hashOf(styles[0]!)}; img-src data:`
  return withPolicy(bare, policy)
    .replace('</head>', () => `<style>${styles[0]}</style>\n</head>`)
    .replace(
      '</body>',
      () =>
        `${['run', 'phrases'].map((id) => `<script type="application/json" id="${id}"></script>\n`).join('')}<script type="module">${scripts[0]}</script>\n</body>`,
    )
}

function withPolicy(html: string, policy: string): string {
  const meta = `<meta http-equiv="Content-Security-Policy" content="${policy}" />`
  return html.replace('<meta charset="utf-8" />', (charset) => `${charset}\n    ${meta}`)
}

function hashOf(source: string): string {
  return `'sha256-${createHash('sha256').update(source).digest('base64')}'`
}

/** What the build depends on. tests/test_web_build.py computes the same. */
const SOURCES = ['build', 'index.html', 'package-lock.json', 'public', 'src', 'svelte.config.js', 'vite.config.ts']

export function hashOfSources(root: string): string {
  const hash = createHash('sha256')
  for (const name of SOURCES.flatMap((source) => files(root, source)).sort()) {
    hash.update(`${name}\0`)
    hash.update(readFileSync(join(root, name)))
    hash.update('\0')
  }
  return hash.digest('hex')
}

function files(root: string, path: string): string[] {
  if (/\.test\.ts$|^src\/testing$/.test(path)) return []
  try {
    return readdirSync(join(root, path)).flatMap((name) => files(root, `${path}/${name}`))
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOTDIR') return [path]
    throw error
  }
}
